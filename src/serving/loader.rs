//! Loading, one model at a time: a thread that works off the slots that are to be loaded, and ends when none is left.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use tracing::{info, warn};

use super::load::{Place, load};
use super::{LoadError, LoadRequest, Loading, Served, Serving, Slot};
use crate::config::ModelName;

/// A slot's turn.
struct Turn {
    name: ModelName,
    ticket: u64,
    request: LoadRequest,
}

impl Serving {
    /// Begins to load a model under a name; returns at once. What was served under the name before finishes its
    /// requests, and new ones wait for the new weights.
    pub fn load(self: &Arc<Self>, name: ModelName, request: LoadRequest) -> Result<(), LoadError> {
        let mut slots = self.slots();
        if slots.closed {
            return Err(LoadError::ShuttingDown);
        }
        if !slots.by_name.contains_key(&name) && slots.by_name.len() >= self.limits.max_models {
            return Err(LoadError::TooMany(self.limits.max_models));
        }
        if !slots.loader {
            let this = self.clone();
            let loader = std::thread::Builder::new().name("load".into());
            loader.spawn(move || this.work_off())?;
            slots.loader = true;
        }
        slots.last_ticket += 1;
        let before = match slots.by_name.remove(&name) {
            Some(Slot::Ready { served, .. }) => Some(served),
            Some(Slot::Loading(loading)) => loading.before,
            Some(Slot::Failed { .. }) | None => None,
        };
        let loading = Loading {
            source: request.source.clone(),
            ticket: slots.last_ticket,
            request: Some(request),
            before,
        };
        slots.by_name.insert(name, Slot::Loading(loading));
        drop(slots);
        self.changed.notify_waiters();
        Ok(())
    }

    fn work_off(&self) {
        while let Some(turn) = self.next_turn() {
            self.load_now(turn);
        }
    }

    /// The slot that has waited longest. With none the thread ends, and that is known under the same lock.
    fn next_turn(&self) -> Option<Turn> {
        let mut slots = self.slots();
        let waiting = slots.by_name.iter_mut().filter_map(|(name, slot)| match slot {
            Slot::Loading(loading) if loading.request.is_some() => Some((name, loading)),
            _ => None,
        });
        let next = waiting.min_by_key(|(_, loading)| loading.ticket);
        let turn = next.and_then(|(name, loading)| {
            Some(Turn {
                name: name.clone(),
                ticket: loading.ticket,
                request: loading.request.take()?,
            })
        });
        slots.loader = turn.is_some();
        turn
    }

    fn load_now(&self, turn: Turn) {
        let Turn {
            name,
            ticket,
            request,
        } = turn;
        let place = Place {
            cache: &self.cache,
            device: &self.device,
            engine: &self.engine,
            limits: self.limits,
        };
        let source = request.source.clone();
        let wanted = || self.is_current(&name, ticket);
        let attempt = AssertUnwindSafe(|| load(&name, request, &place, &wanted));
        let loaded = catch_unwind(attempt).unwrap_or_else(|_| Err("loading panicked".to_owned()));
        match &loaded {
            Ok(served) => info!(model = %name, fingerprint = served.fingerprint, "model is ready"),
            Err(detail) => warn!(model = %name, error = detail, "model cannot be loaded"),
        }
        let mut slots = self.slots();
        if let Some(Slot::Loading(loading)) = slots.by_name.get_mut(&name)
            && loading.ticket == ticket
        {
            let before = loading.before.take();
            slots
                .by_name
                .insert(name, after(loaded.map(Arc::new), before, source));
        }
        drop(slots);
        self.changed.notify_waiters();
    }

    /// False once a later load or an unload of the name came.
    fn is_current(&self, name: &ModelName, ticket: u64) -> bool {
        matches!(self.slots().by_name.get(name), Some(Slot::Loading(l)) if l.ticket == ticket)
    }
}

/// A failed load leaves a name that worked as it was.
fn after(loaded: Result<Arc<Served>, String>, before: Option<Arc<Served>>, source: String) -> Slot {
    match (loaded, before) {
        (Ok(served), _) => Slot::Ready {
            served,
            not_replaced: None,
        },
        (Err(detail), Some(served)) => Slot::Ready {
            served,
            not_replaced: Some(format!("{source} could not be loaded in its place: {detail}")),
        },
        (Err(detail), None) => Slot::Failed { source, detail },
    }
}
