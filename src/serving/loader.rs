//! Loading, one model at a time: a thread that works off the slots that are to be loaded, and ends when none is left.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::load::{Place, Turn, load};
use super::memory::{Need, Reservation};
use super::slot::{Back, Former, Held, Loading, Slot, Slots};
use super::{LoadError, LoadRequest, Served, Serving, ServingError};
use crate::config::ModelName;

/// How long a load that waits for memory sleeps before it looks whether it is still wanted.
const LOOK: Duration = Duration::from_millis(50);

/// A slot's turn.
struct SlotTurn<'a> {
    serving: &'a Serving,
    name: ModelName,
    ticket: u64,
}

impl Serving {
    /// Begins to load a model under a name; returns at once. What was served under the name before finishes its
    /// requests, and new ones wait for the new weights. `aliases` None leaves the name's aliases as they are.
    pub fn load(
        self: &Arc<Self>,
        name: ModelName,
        request: LoadRequest,
        aliases: Option<&[ModelName]>,
    ) -> Result<(), LoadError> {
        let mut slots = self.slots();
        if slots.closed {
            return Err(LoadError::ShuttingDown);
        }
        if slots.aliases.contains_key(&name) {
            return Err(LoadError::NameTaken("name", name));
        }
        let aliases = aliases.map(|aliases| (aliases, aliases.len()));
        let kept = slots.aliases.values().filter(|to| **to == name).count();
        let others =
            slots.by_name.keys().filter(|other| **other != name).count() + slots.aliases.len() - kept;
        if others + 1 + aliases.map_or(kept, |(_, count)| count) > self.limits.max_models {
            return Err(LoadError::TooMany(self.limits.max_models));
        }
        for alias in aliases.iter().flat_map(|(aliases, _)| *aliases) {
            let elsewhere = slots.aliases.get(alias).is_some_and(|to| *to != name);
            if elsewhere || *alias == name || slots.by_name.contains_key(alias) {
                return Err(LoadError::NameTaken("aliases", alias.clone()));
            }
        }
        self.start_loader(&mut slots)?;
        if let Some((aliases, _)) = aliases {
            slots.aliases.retain(|_, to| *to != name);
            for alias in aliases {
                slots.aliases.insert(alias.clone(), name.clone());
            }
        }
        let mut held = Vec::new();
        let former = slots.by_name.remove(&name).and_then(|mut slot| {
            if let Slot::Loading(loading) = &mut slot {
                held = std::mem::take(&mut loading.held);
            }
            Former::of(slot)
        });
        slots.enqueue(name, request, former, Back::No, held);
        Ok(())
    }

    /// As [`Serving::load`], unless the name means something by now.
    pub fn load_if_new(self: &Arc<Self>, name: ModelName, request: LoadRequest) -> Result<(), LoadError> {
        match self.info(&name) {
            Some(_) => Ok(()),
            None => self.load(name, request, None),
        }
    }

    /// Begins to load a model again that had made room for another.
    pub(super) fn load_again(
        self: &Arc<Self>,
        slots: &mut Slots,
        name: &ModelName,
        held: Held,
    ) -> Result<(), ServingError> {
        let Some(Slot::Unloaded { request }) = slots.by_name.get(name) else {
            return Err(ServingError::Unknown(name.to_string()));
        };
        let request = LoadRequest {
            asked: Instant::now(),
            ..request.clone()
        };
        self.start_loader(slots).map_err(|error| ServingError::Failed {
            name: name.to_string(),
            detail: error.to_string(),
        })?;
        slots.enqueue(name.clone(), request, None, Back::Asked, vec![held]);
        Ok(())
    }

    fn start_loader(self: &Arc<Self>, slots: &mut Slots) -> Result<(), std::io::Error> {
        if !slots.loader {
            let this = self.clone();
            let loader = std::thread::Builder::new().name("load".into());
            loader.spawn(move || this.work_off())?;
            slots.loader = true;
        }
        Ok(())
    }

    fn work_off(&self) {
        while let Some((turn, request)) = self.next_turn() {
            self.load_now(&turn, request);
        }
    }

    /// The slot that has waited longest. With none the thread ends, and that is known under the same lock.
    fn next_turn(&self) -> Option<(SlotTurn<'_>, LoadRequest)> {
        let mut slots = self.slots();
        let waiting = slots.by_name.iter_mut().filter_map(|(name, slot)| match slot {
            Slot::Loading(loading) if !loading.begun => Some((name, loading)),
            _ => None,
        });
        let next = waiting.min_by_key(|(_, loading)| loading.ticket);
        let turn = next.map(|(name, loading)| {
            loading.begun = true;
            let turn = SlotTurn {
                serving: self,
                name: name.clone(),
                ticket: loading.ticket,
            };
            (turn, loading.request.clone())
        });
        slots.loader = turn.is_some();
        turn
    }

    fn load_now(&self, turn: &SlotTurn<'_>, request: LoadRequest) {
        let place = Place {
            cache: &self.cache,
            device: &self.device,
            engine: &self.engine,
            limits: self.limits,
            memory: &self.memory,
        };
        let attempt = AssertUnwindSafe(|| load(&turn.name, request, &place, turn));
        let loaded = catch_unwind(attempt).unwrap_or_else(|_| Err("loading panicked".to_owned()));
        let name = &turn.name;
        match &loaded {
            Ok(served) => info!(model = %name, fingerprint = served.fingerprint, "model is ready"),
            Err(detail) => warn!(model = %name, error = detail, "model cannot be loaded"),
        }
        let mut slots = self.slots();
        if matches!(slots.by_name.get(name), Some(Slot::Loading(l)) if l.ticket == turn.ticket)
            && let Some(Slot::Loading(loading)) = slots.by_name.remove(name)
        {
            slots.settle(name, loading, loaded.map(Arc::new));
        }
    }
}

impl Slots {
    fn enqueue(
        &mut self,
        name: ModelName,
        request: LoadRequest,
        former: Option<Former>,
        back: Back,
        held: Vec<Held>,
    ) {
        self.last_ticket += 1;
        let loading = Loading {
            request,
            ticket: self.last_ticket,
            begun: false,
            former,
            back,
            held,
        };
        self.by_name.insert(name, Slot::Loading(loading));
    }

    /// A failed load leaves a name that worked as it was.
    fn settle(&mut self, name: &ModelName, loading: Loading, loaded: Result<Arc<Served>, String>) {
        let Loading {
            request,
            former,
            back,
            held,
            ..
        } = loading;
        let mut failure = None;
        let slot = match (loaded, former) {
            (Ok(served), _) => Slot::Ready {
                served,
                request,
                not_replaced: back.why(),
            },
            // It was served before, and what failed may pass: the next request tries again.
            (Err(detail), None) if !matches!(back, Back::No) => {
                failure = Some(detail);
                Slot::Unloaded { request }
            }
            (Err(detail), None) => Slot::Failed {
                source: request.source,
                detail,
            },
            (Err(detail), Some(former)) => {
                let source = &request.source;
                let why = format!("{source} could not be loaded in its place: {detail}");
                let (there, request) = match former {
                    Former::Kept(served, request) => (Some(served), request),
                    Former::Leaving(served, request) => (served.upgrade(), request),
                };
                match there {
                    Some(served) => Slot::Ready {
                        served,
                        request,
                        not_replaced: Some(why),
                    },
                    // It had to make room, and comes back.
                    None => return self.enqueue(name.clone(), request, None, Back::Replacing(why), held),
                }
            }
        };
        let answer = match &slot {
            Slot::Ready { served, .. } => Ok(served.clone()),
            Slot::Failed { detail, .. } => Err(ServingError::Failed {
                name: name.to_string(),
                detail: detail.clone(),
            }),
            Slot::Loading(_) | Slot::Unloaded { .. } => Err(ServingError::Failed {
                name: name.to_string(),
                detail: failure.unwrap_or_default(),
            }),
        };
        self.by_name.insert(name.clone(), slot);
        // The model goes to those that waited for it before anything else can take it away again.
        for held in held {
            let _ = held.send(answer.clone());
        }
    }
}

impl Turn for SlotTurn<'_> {
    fn is_wanted(&self) -> bool {
        matches!(self.serving.slots().by_name.get(&self.name), Some(Slot::Loading(l)) if l.ticket == self.ticket)
    }

    /// First what the model replaces gives its memory, then the models that were not asked for longest. They keep it until
    /// their requests have ended, which is waited for.
    fn make_room(&self, need: Need) -> Result<Reservation, String> {
        let memory = &self.serving.memory;
        memory.check(need)?;
        let deadline = Instant::now() + self.serving.limits.hold;
        let mut leaving: Vec<Weak<Reservation>> = Vec::new();
        loop {
            if let Some(reservation) = memory.reserve(need) {
                return Ok(reservation);
            }
            if !self.is_wanted() {
                return Err("another request for the name came".to_owned());
            }
            let coming: u64 = leaving
                .iter()
                .filter_map(Weak::upgrade)
                .map(|share| share.bytes())
                .sum();
            if !memory.fits_after(coming, need)
                && let Some(share) = self.take_from_another()
            {
                leaving.push(share);
                continue;
            }
            if Instant::now() > deadline {
                return Err("the memory it needs is in use by other models' requests".to_owned());
            }
            memory.wait(LOOK);
        }
    }
}

impl SlotTurn<'_> {
    /// The share of a model that is not served from now on; None if there is none to be had.
    fn take_from_another(&self) -> Option<Weak<Reservation>> {
        let mut slots = self.serving.slots();
        match slots.by_name.get_mut(&self.name) {
            Some(Slot::Loading(loading)) if loading.ticket == self.ticket => {
                if let Some(share) = loading.give_up_former() {
                    info!(model = %self.name, "what it replaces is unloaded first: there is no memory for both");
                    return Some(share);
                }
            }
            _ => return None,
        }
        // What another name meant before its own load counts as that name's model.
        let there = slots.by_name.iter().filter_map(|(name, slot)| match slot {
            Slot::Ready { served, .. } => Some((served.standing(), name.clone())),
            Slot::Loading(Loading {
                former: Some(Former::Kept(served, _)),
                ..
            }) => Some((served.standing(), name.clone())),
            _ => None,
        });
        let (_, name) = there.min()?;
        if let Some(Slot::Loading(loading)) = slots.by_name.get_mut(&name) {
            return loading.give_up_former();
        }
        let Some(Slot::Ready { served, request, .. }) = slots.by_name.remove(&name) else {
            return None;
        };
        info!(model = %name, "is unloaded to make room for {}", self.name);
        let share = served.memory().clone();
        slots.by_name.insert(name, Slot::Unloaded { request });
        Some(share)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(source: &str) -> LoadRequest {
        LoadRequest {
            folder: source.into(),
            adapter: None,
            source: source.to_owned(),
            cached: None,
            arithmetic: cauldron_lm::Arithmetic::F32,
            asked: Instant::now(),
        }
    }

    #[test]
    fn what_had_to_make_room_for_a_failed_load_comes_back_with_the_reason_and_those_that_wait() {
        let mut slots = Slots::default();
        let name: ModelName = "m".parse().expect("a name");
        let (held, mut coming) = tokio::sync::oneshot::channel();
        let former = Former::Leaving(Weak::new(), request("old"));
        slots.enqueue(name.clone(), request("new"), Some(former), Back::No, vec![held]);
        let Some(Slot::Loading(loading)) = slots.by_name.remove(&name) else {
            panic!("a slot that is loading");
        };
        slots.settle(&name, loading, Err("broken".into()));
        let info = slots.info(&name).expect("a slot");
        assert_eq!((info.status, info.source.as_str()), ("loading", "old"));
        assert!(
            info.error
                .is_some_and(|error| error.contains("new") && error.contains("broken"))
        );
        assert!(coming.try_recv().is_err(), "it still waits");
        let Some(Slot::Loading(loading)) = slots.by_name.remove(&name) else {
            panic!("a slot that is loading");
        };
        slots.settle(&name, loading, Err("gone".into()));
        assert_eq!(slots.info(&name).map(|info| info.status), Some("unloaded"));
        assert!(matches!(coming.try_recv(), Ok(Err(ServingError::Failed { .. }))));
    }
}
