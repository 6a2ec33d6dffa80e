//! The query strings of /merge.

use uuid::Uuid;

use crate::api::extract::{FromSegment, PairsOfQuery, bad_query as bad, only_parameter};
use crate::api::problem::Problem;
use crate::jobs::JobStatus;

const DEFAULT_PAGE: u32 = 50;
const MAX_PAGE: u32 = 200;

/// The priority that POST /merge asks for.
pub fn priority(query: PairsOfQuery) -> Result<i64, Problem> {
    let Some(value) = only_parameter(query, "priority")? else {
        return Ok(0);
    };
    let priority = value.parse().ok().filter(|value| (-100..=100).contains(value));
    priority.ok_or_else(|| bad("priority", "must be a number from -100 to 100"))
}

/// Which jobs, how many.
#[derive(Debug, Default, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
pub struct ListQuery {
    /// Only jobs in this state.
    status: Option<String>,
    /// `next` of the page before.
    after: Option<String>,
    /// 1 to 200; default 50.
    limit: Option<String>,
}

impl ListQuery {
    /// Takes each known parameter once.
    pub fn read(pairs: Vec<(String, String)>) -> Result<Self, Problem> {
        let mut query = Self::default();
        for (name, value) in pairs {
            let place = match name.as_str() {
                "status" => &mut query.status,
                "after" => &mut query.after,
                "limit" => &mut query.limit,
                _ => {
                    let shown: String = name.chars().take(100).collect();
                    return Err(bad(&shown, "unknown parameter; known are status, after, limit"));
                }
            };
            if place.replace(value).is_some() {
                return Err(bad(&name, "is given twice"));
            }
        }
        Ok(query)
    }

    pub fn check(&self) -> Result<(Option<JobStatus>, Option<Uuid>, u32), Problem> {
        let status = match self.status.as_deref() {
            None => None,
            Some(text) => Some(JobStatus::parse(text).ok_or_else(|| {
                bad(
                    "status",
                    "must be queued, running, succeeded, failed or cancelled",
                )
            })?),
        };
        let after = match self.after.as_deref() {
            None => None,
            Some(text) => Some(Uuid::from_segment(text).ok_or_else(|| bad("after", "must be a job id"))?),
        };
        let limit = match self.limit.as_deref() {
            None => DEFAULT_PAGE,
            Some(text) => text
                .parse()
                .ok()
                .filter(|limit| (1..=MAX_PAGE).contains(limit))
                .ok_or_else(|| bad("limit", "must be from 1 to 200"))?,
        };
        Ok((status, after, limit))
    }
}
