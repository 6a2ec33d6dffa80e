//! One connection: its requests one after the other, and its end.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use http_body::{Frame, SizeHint};
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, watch};
use tower::ServiceExt;
use tracing::debug;

use super::Shared;
use super::body::Timed;
use super::stall::Stalling;

/// What a connection without a request has left once the server drains: enough to send the end of an answer.
const GRACE: Duration = Duration::from_secs(1);

pub(super) struct Connection {
    shared: Arc<Shared>,
    /// Requests of this connection that are being answered: none or one.
    requests: Arc<AtomicUsize>,
    _place: OwnedSemaphorePermit,
}

impl Connection {
    pub fn new(shared: Arc<Shared>, place: OwnedSemaphorePermit) -> Self {
        Self {
            shared,
            requests: Arc::default(),
            _place: place,
        }
    }

    /// Serves to the end of the connection, or to that of the server.
    pub async fn serve(self, stream: TcpStream) {
        // Tokens are small and must not wait for each other.
        let _ = stream.set_nodelay(true);
        let limits = self.shared.limits;
        let io = TokioIo::new(Stalling::new(stream, limits.stall));
        let service = service_fn(|request| self.answer(request));
        // One that comes while the server drains has its one request; an older one without any is closed at once.
        let mut draining = self.shared.draining.is_cancelled();
        let connection = http1::Builder::new()
            .keep_alive(!draining)
            .timer(TokioTimer::new())
            .header_read_timeout(limits.header)
            .max_header_size(limits.header_bytes)
            .serve_connection(io, service);
        tokio::pin!(connection);
        loop {
            tokio::select! {
                ended = connection.as_mut() => {
                    if let Err(e) = ended {
                        debug!(error = %e, "a connection ended early");
                    }
                    return;
                }
                () = self.shared.draining.cancelled(), if !draining => {
                    draining = true;
                    connection.as_mut().graceful_shutdown();
                }
                // The protocol waits for the rest of half a header; we do not.
                () = tokio::time::sleep(GRACE), if draining => {
                    if self.requests.load(Ordering::Relaxed) == 0 {
                        return;
                    }
                }
                () = self.shared.aborted.cancelled() => return,
            }
        }
    }

    async fn answer(&self, request: hyper::Request<Incoming>) -> Result<Response, Infallible> {
        let busy = Busy::new(self);
        let longest = self.shared.limits.body;
        let request: Request = request.map(|body| Body::new(Timed::new(body, longest)));
        let response = self.shared.router.clone().oneshot(request).await?;
        Ok(response.map(|body| Body::new(Counted { body, _busy: busy })))
    }
}

/// Counts a request while it lives.
struct Busy {
    here: Arc<AtomicUsize>,
    everywhere: watch::Sender<usize>,
}

impl Busy {
    fn new(connection: &Connection) -> Self {
        let everywhere = connection.shared.requests.clone();
        everywhere.send_modify(|count| *count += 1);
        connection.requests.fetch_add(1, Ordering::Relaxed);
        Self {
            here: connection.requests.clone(),
            everywhere,
        }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.here.fetch_sub(1, Ordering::Relaxed);
        self.everywhere.send_modify(|count| *count -= 1);
    }
}

/// A body whose request is counted until it has been handed over.
struct Counted {
    body: Body,
    _busy: Busy,
}

impl http_body::Body for Counted {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
