//! GET /merge/{id}/events: progress as it happens.

use std::convert::Infallible;
use std::time::{Duration, Instant};

use axum::extract::State;
use axum::response::sse::{Event, KeepAlive, Sse};
use serde::Serialize;
use serde_json::json;
use tokio::sync::mpsc::Sender;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use uuid::Uuid;

use super::unknown;
use super::view::view;
use crate::api::extract::Segment;
use crate::api::problem::Problem;
use crate::app::{App, AppState};
use crate::jobs::JobStatus;

const PERIOD: Duration = Duration::from_millis(250);

/// Progress of a merge as server-sent events
///
/// `status` on each change of state, `progress` with bytes_done, bytes_total and bytes_per_second, and after a final
/// state a last `done` with the whole job.
#[utoipa::path(get, path = "/merge/{id}/events", tag = "merge", params(("id" = String, Path)),
    responses((status = 200, content_type = "text/event-stream", body = String), (status = 404, body = Problem, content_type = "application/problem+json")))]
pub async fn merge_events(
    State(AppState(app)): State<AppState>,
    Segment(id): Segment<Uuid>,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, Problem> {
    app.jobs.get(id).await?.ok_or_else(unknown)?;
    let (sender, receiver) = tokio::sync::mpsc::channel(16);
    tokio::spawn(async move {
        // Ends when the merge is done, the client is gone or the service drains.
        tokio::select! {
            () = follow(&app, id, &sender) => {}
            () = sender.closed() => {}
            () = app.shutdown.cancelled() => {}
        }
    });
    Ok(Sse::new(ReceiverStream::new(receiver)).keep_alive(KeepAlive::default()))
}

async fn follow(app: &App, id: Uuid, events: &Sender<Result<Event, Infallible>>) {
    let (mut status, mut bytes, mut rate) = (None, None, Rate::default());
    loop {
        let Ok(Some(job)) = app.jobs.get(id).await else {
            return;
        };
        let job = view(app, job);
        let mut out = Vec::new();
        if status.replace(job.status) != Some(job.status) {
            out.push(event("status", &json!({"status": job.status})));
        }
        let done = job.progress.bytes_done;
        let per_second = rate.at(job.status, done);
        if bytes.replace(done) != Some(done) {
            let total = job.progress.bytes_total;
            let progress = json!({"bytes_done": done, "bytes_total": total, "bytes_per_second": per_second});
            out.push(event("progress", &progress));
        }
        let terminal = job.status.is_terminal();
        if terminal {
            out.push(event("done", &job));
        }
        for event in out {
            if events.send(Ok(event)).await.is_err() {
                return;
            }
        }
        if terminal {
            return;
        }
        tokio::time::sleep(PERIOD).await;
    }
}

fn event(name: &str, content: &impl Serialize) -> Event {
    let json = serde_json::to_string(content).unwrap_or_default();
    Event::default().event(name).data(json)
}

/// Bytes a second since the merge was first seen to run: time in the queue is not the merge's.
#[derive(Debug, Default)]
struct Rate {
    first: Option<(Instant, u64)>,
}

impl Rate {
    fn at(&mut self, status: JobStatus, done: u64) -> f64 {
        if status == JobStatus::Queued {
            // It may have run before and come back.
            self.first = None;
        } else if status == JobStatus::Running {
            self.first.get_or_insert_with(|| (Instant::now(), done));
        }
        self.first.map_or(0.0, |(start, first)| {
            let seconds = start.elapsed().as_secs_f64().max(1e-3);
            (done.saturating_sub(first) as f64 / seconds).round()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_counts_from_the_first_sight_of_a_running_merge() {
        let mut rate = Rate::default();
        assert_eq!(rate.at(JobStatus::Queued, 0), 0.0);
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(rate.at(JobStatus::Running, 1000), 0.0);
        std::thread::sleep(Duration::from_millis(100));
        let seen = rate.at(JobStatus::Running, 2000);
        assert!((2000.0..=10_000.0).contains(&seen), "{seen}");
        // Back in the queue and running again: a new clock.
        rate.at(JobStatus::Queued, 0);
        assert_eq!(rate.at(JobStatus::Running, 500), 0.0);
    }
}
