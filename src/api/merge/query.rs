//! The query strings of /merge.

use axum::extract::Query;
use axum::extract::rejection::QueryRejection;
use uuid::Uuid;

use crate::api::extract::FromSegment;
use crate::api::problem::Problem;
use crate::jobs::JobStatus;

const DEFAULT_PAGE: u32 = 50;
const MAX_PAGE: u32 = 200;

/// A query string, if it could be read.
pub type PairsOfQuery = Result<Query<Vec<(String, String)>>, QueryRejection>;

pub fn pairs(query: PairsOfQuery) -> Result<Vec<(String, String)>, Problem> {
    let Query(pairs) = query.map_err(|e| bad("query", &e.body_text()))?;
    Ok(pairs)
}

/// The priority that POST /merge asks for.
pub fn priority(query: PairsOfQuery) -> Result<i64, Problem> {
    let mut priority = None;
    for (name, value) in pairs(query)? {
        if name != "priority" {
            let shown: String = name.chars().take(100).collect();
            return Err(bad(&shown, "unknown parameter; known is priority"));
        }
        let value = value.parse().ok().filter(|value| (-100..=100).contains(value));
        let value = value.ok_or_else(|| bad("priority", "must be a number from -100 to 100"))?;
        if priority.replace(value).is_some() {
            return Err(bad("priority", "is given twice"));
        }
    }
    Ok(priority.unwrap_or(0))
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

fn bad(field: &str, detail: &str) -> Problem {
    Problem::unprocessable("invalid-query", field, detail)
}
