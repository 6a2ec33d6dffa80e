//! Connections: accepting them, what each may take of time and space, and closing them all in the end. Knows HTTP/1.1 and
//! no route.

mod body;
mod connection;
mod stall;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::warn;

pub use body::TooSlow;
use connection::Connection;

/// After a failed accept, which is mostly for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What connections may cost.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub connections: usize,
    /// From the end of a request, or the start of the connection, to the end of the next header.
    pub header: Duration,
    /// Of request line and header fields together.
    pub header_bytes: usize,
    /// For a whole request body.
    pub body: Duration,
    /// How long a client may take nothing of an answer.
    pub stall: Duration,
}

impl Limits {
    pub fn new(connections: usize) -> Self {
        Self {
            connections,
            header: Duration::from_secs(10),
            header_bytes: 32 << 10,
            body: Duration::from_secs(30),
            stall: Duration::from_secs(30),
        }
    }
}

/// A server that accepts until it is stopped.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    /// And the task that accepts them.
    connections: TaskTracker,
    stopped: CancellationToken,
}

/// What connections have in common.
#[derive(Debug)]
struct Shared {
    router: Router,
    limits: Limits,
    /// Requests that are being answered, to the last byte of their bodies.
    requests: watch::Sender<usize>,
    /// No connection is kept alive any more.
    draining: CancellationToken,
    aborted: CancellationToken,
}

impl Server {
    pub fn start(listener: TcpListener, router: Router, limits: Limits) -> Self {
        let server = Self {
            shared: Arc::new(Shared {
                router,
                limits,
                requests: watch::Sender::new(0),
                draining: CancellationToken::new(),
                aborted: CancellationToken::new(),
            }),
            connections: TaskTracker::new(),
            stopped: CancellationToken::new(),
        };
        let accepting = accept(
            listener,
            server.shared.clone(),
            server.connections.clone(),
            server.stopped.clone(),
        );
        server.connections.spawn(accepting);
        server
    }

    /// Closes connections that wait for a request, and each other one after the request it has. New connections are
    /// taken for one request each: who asks whether the service is ready shall hear that it is not.
    pub fn drain(&self) {
        self.shared.draining.cancel();
    }

    /// Waits until no request is being answered.
    pub async fn idle(&self) {
        let mut requests = self.shared.requests.subscribe();
        // The sender lives as long as we do.
        let _ = requests.wait_for(|count| *count == 0).await;
    }

    /// Accepts no more, and ends what is open after `patience`.
    pub async fn stop(&self, patience: Duration) {
        self.stopped.cancel();
        self.drain();
        self.connections.close();
        if tokio::time::timeout(patience, self.connections.wait())
            .await
            .is_err()
        {
            warn!(connections = self.connections.len(), "connections are cut off");
            self.shared.aborted.cancel();
            self.connections.wait().await;
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stopped.cancel();
        self.shared.aborted.cancel();
    }
}

async fn accept(
    listener: TcpListener,
    shared: Arc<Shared>,
    connections: TaskTracker,
    stopped: CancellationToken,
) {
    let places = Arc::new(Semaphore::new(shared.limits.connections));
    loop {
        let accepted = tokio::select! {
            accepted = next(&listener, &places) => accepted,
            () = stopped.cancelled() => return,
        };
        match accepted {
            Ok((stream, place)) => {
                let connection = Connection::new(shared.clone(), place);
                connections.spawn(connection.serve(stream));
            }
            Err(e) if is_of_the_client(&e) => {}
            Err(e) => {
                warn!(error = %e, "a connection cannot be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Beyond the limit connections wait in the kernel's queue.
async fn next(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> io::Result<(TcpStream, OwnedSemaphorePermit)> {
    let place = places.clone().acquire_owned().await.map_err(io::Error::other)?;
    let (stream, _) = listener.accept().await?;
    Ok((stream, place))
}

fn is_of_the_client(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    [ConnectionAborted, ConnectionRefused, ConnectionReset].contains(&error.kind())
}
