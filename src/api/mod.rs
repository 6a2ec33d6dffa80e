//! The wire, and only the wire: routes, extractors, errors, documents. Handlers extract, check, call one function of
//! the domain and map its result.

mod checkpoints;
mod docs;
mod evals;
mod extract;
mod guard;
mod health;
mod merge;
mod models;
pub mod openai;
pub mod problem;
mod router;
mod spec;
mod sweeps;

pub use guard::OPEN_ROUTES;
pub use router::router;
pub use spec::openapi;
