//! Loading, one model at a time: a thread that works off the slots that are to be loaded, and ends when none is left.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cauldron_lm::Arithmetic;
use tokio::sync::oneshot;
use tracing::{info, warn};

use super::family::{Family, Parentage};
use super::load::{LoadFailure, Place, Turn, load};
use super::memory::{Need, Reservation};
use super::rescue::At;
use super::shares::OpenRecipe;
use super::slot::{Former, Held, Loading, Origin, Pinned, Slot, Slots, WeightsFrom};
use super::station::Station;
use super::{LoadError, LoadRequest, Look, Served, Serving, ServingError};
use crate::config::ModelName;

/// How long a load that waits for memory sleeps before it looks whether it is still wanted.
const LOOK: Duration = Duration::from_millis(50);

/// Points that may wait for their turn.
const MOST_WAITING_POINTS: usize = 256;

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
        self.check_names(&slots, &name, aliases)?;
        self.start_loader(&mut slots)?;
        slots.set_aliases(&name, aliases);
        slots.drop_family(&name);
        let mut held = Vec::new();
        let former = slots.by_name.remove(&name).and_then(|mut slot| {
            if let Slot::Loading(loading) = &mut slot {
                held = std::mem::take(&mut loading.held);
            }
            Former::of(slot)
        });
        let model = Pinned::new(request, &self.cache);
        slots.enqueue(name, model, former, Origin::Posted, held);
        Ok(())
    }

    /// Begins to serve a family under a name; returns at once. What was served under the name before finishes its requests.
    pub fn load_family(
        &self,
        name: ModelName,
        recipe: OpenRecipe,
        arithmetic: Arithmetic,
        parentage: Parentage,
        aliases: Option<&[ModelName]>,
    ) -> Result<(), LoadError> {
        let mut slots = self.slots();
        if slots.closed {
            return Err(LoadError::ShuttingDown);
        }
        self.check_names(&slots, &name, aliases)?;
        let family = Family::start(
            name.clone(),
            recipe,
            arithmetic,
            parentage,
            self.roomiest().clone(),
        )?;
        slots.set_aliases(&name, aliases);
        slots.drop_family(&name);
        slots.drop_model(&name);
        slots.families.insert(name, family);
        Ok(())
    }

    fn check_names(
        &self,
        slots: &Slots,
        name: &ModelName,
        aliases: Option<&[ModelName]>,
    ) -> Result<(), LoadError> {
        if slots.aliases.contains_key(name) {
            return Err(LoadError::NameTaken("name", name.clone()));
        }
        let kept = slots.aliases.values().filter(|to| *to == name).count();
        let own = usize::from(slots.has(name)) + kept;
        if slots.names() - own + 1 + aliases.map_or(kept, <[_]>::len) > self.limits.max_models {
            return Err(LoadError::TooMany(self.limits.max_models));
        }
        for alias in aliases.into_iter().flatten() {
            let elsewhere = slots.aliases.get(alias).is_some_and(|to| to != name);
            if elsewhere || alias == name || slots.has(alias) {
                return Err(LoadError::NameTaken("aliases", alias.clone()));
            }
        }
        Ok(())
    }

    /// The model of a name; loads it if the name means nothing.
    pub(super) fn first_use(
        self: &Arc<Self>,
        name: ModelName,
        request: LoadRequest,
    ) -> Result<Look, ServingError> {
        let mut slots = self.slots();
        if slots.closed {
            return Err(ServingError::ShuttingDown);
        }
        let name = slots.resolve(&name).clone();
        if slots.by_name.contains_key(&name) {
            return self.look_at(&mut slots, &name);
        }
        match &request.weights {
            WeightsFrom::Folder { .. } if slots.families.contains_key(&name) => {
                return Err(ServingError::NoPoint(name.to_string()));
            }
            WeightsFrom::Folder { .. } if slots.names() >= self.limits.max_models => {
                return Err(ServingError::NoName(self.limits.max_models));
            }
            WeightsFrom::Family { .. } if slots.waiting_points() >= MOST_WAITING_POINTS => {
                return Err(ServingError::Busy(name.to_string()));
            }
            // The name means another family now.
            WeightsFrom::Family { family, .. }
                if !slots
                    .families
                    .get(&family.name)
                    .is_some_and(|now| Arc::ptr_eq(now, family)) =>
            {
                return Err(ServingError::Unknown(name.to_string()));
            }
            _ => {}
        }
        let model = Pinned::new(request, &self.cache);
        self.load_for_request(&mut slots, &name, model, Origin::FirstUse)
    }

    /// Begins to load a model that a request asks for.
    pub(super) fn load_for_request(
        self: &Arc<Self>,
        slots: &mut Slots,
        name: &ModelName,
        model: Pinned,
        origin: Origin,
    ) -> Result<Look, ServingError> {
        self.start_loader(slots).map_err(|error| ServingError::Failed {
            name: name.to_string(),
            detail: error.to_string(),
        })?;
        let (held, coming) = oneshot::channel();
        slots.enqueue(name.clone(), model, None, origin, vec![held]);
        Ok(Look::Coming(coming))
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
            (turn, loading.model.request.clone())
        });
        slots.loader = turn.is_some();
        turn
    }

    fn load_now(&self, turn: &SlotTurn<'_>, request: LoadRequest) {
        let mut loaded = self.try_to_load(turn, &request, self.roomiest());
        if let Err((at, failure)) = &loaded
            && let Some(station) = self.help(at, failure, &request)
        {
            loaded = self.try_to_load(turn, &request, station);
            // That a device failed is told again.
            if let Err((at, failure @ LoadFailure::DeviceLost(_))) = &loaded {
                self.help(at, failure, &request);
            }
        }
        let loaded = loaded.map_err(|(_, failure)| failure);
        let name = &turn.name;
        match &loaded {
            Ok(served) => info!(model = %name, fingerprint = served.fingerprint, "model is ready"),
            Err(failure) => warn!(model = %name, error = %failure, "model is not loaded"),
        }
        let mut slots = self.slots();
        if matches!(slots.by_name.get(name), Some(Slot::Loading(l)) if l.ticket == turn.ticket)
            && let Some(Slot::Loading(loading)) = slots.by_name.remove(name)
        {
            // Its device may have failed since, when the slot did not show it yet.
            let loaded = loaded.and_then(|served| match served.is_alive() {
                true => Ok(served),
                false => Err(LoadFailure::device_failed()),
            });
            slots.settle(name, loading, loaded.map(Arc::new));
        }
    }
}

impl Serving {
    /// On the station of a family, or else on this one; with an error where that was.
    fn try_to_load(
        &self,
        turn: &SlotTurn<'_>,
        request: &LoadRequest,
        station: &Arc<Station>,
    ) -> Result<Served, (At, LoadFailure)> {
        let station = match &request.weights {
            WeightsFrom::Family { family, .. } => family.station(),
            WeightsFrom::Folder { .. } => station,
        };
        let mut at = At {
            station: station.clone(),
            opening: 0,
        };
        let attempt = || {
            let (device, opening) = station.device().map_err(LoadFailure::DeviceLost)?;
            at.opening = opening;
            let place = Place {
                cache: &self.cache,
                station,
                device: &device,
                opening,
                limits: self.limits,
            };
            load(&turn.name, request.clone(), &place, turn)
        };
        catch_unwind(AssertUnwindSafe(attempt))
            .unwrap_or_else(|_| Err("loading panicked".to_owned().into()))
            .map_err(|failure| (at, failure))
    }
}

impl Slots {
    fn enqueue(
        &mut self,
        name: ModelName,
        model: Pinned,
        former: Option<Former>,
        origin: Origin,
        held: Vec<Held>,
    ) {
        self.last_ticket += 1;
        let loading = Loading {
            model,
            ticket: self.last_ticket,
            begun: false,
            committed: false,
            former,
            origin,
            held,
        };
        self.by_name.insert(name, Slot::Loading(loading));
    }

    /// A failed load leaves a name that worked as it was.
    fn settle(&mut self, name: &ModelName, loading: Loading, loaded: Result<Arc<Served>, LoadFailure>) {
        let Loading {
            model,
            former,
            origin,
            mut held,
            ..
        } = loading;
        held.retain(|held| !held.is_closed());
        let failure = match loaded {
            Ok(served) => {
                if let Some(Former::Kept(former, _)) = former {
                    former.set_leaving(true);
                }
                let slot = Slot::Ready {
                    served: served.clone(),
                    model,
                    not_replaced: origin.why(),
                };
                self.by_name.insert(name.clone(), slot);
                return answer(held, Ok(served));
            }
            // Somebody has come since nobody was there.
            Err(LoadFailure::Unwanted) if !held.is_empty() => {
                return self.enqueue(name.clone(), model, former, origin, held);
            }
            Err(failure) => failure,
        };
        let detail = failure.to_string();
        let why = format!(
            "{} could not be loaded in its place: {detail}",
            model.request.source
        );
        let slot = match (former, origin) {
            (Some(Former::Kept(served, model)), _) if served.is_alive() => ready_again(served, model, why),
            (Some(Former::Kept(_, model)), _) => {
                let origin = Origin::InsteadOf(why);
                return self.enqueue(name.clone(), model, None, origin, held);
            }
            (Some(Former::Leaving(served, model)), _) => match served.upgrade() {
                Some(served) if served.is_alive() => ready_again(served, model, why),
                // It had to make room, or its device failed, and comes back.
                _ => {
                    let origin = Origin::InsteadOf(why);
                    return self.enqueue(name.clone(), model, None, origin, held);
                }
            },
            (Some(Former::Unloaded(model)), _) if held.is_empty() => Slot::Unloaded {
                model,
                why: Some(why),
            },
            (Some(Former::Unloaded(model)), _) => {
                let origin = Origin::InsteadOf(why);
                return self.enqueue(name.clone(), model, None, origin, held);
            }
            (None, Origin::FirstUse) => return answer(held, Err(failure.of(name))),
            (None, Origin::Posted)
                if matches!(failure, LoadFailure::Broken(_) | LoadFailure::TooLarge(_)) =>
            {
                Slot::Failed {
                    source: model.request.source,
                    detail,
                }
            }
            // What failed may pass: the next request tries again.
            (None, _) => Slot::Unloaded {
                model,
                why: Some(detail),
            },
        };
        let given = match &slot {
            Slot::Ready { served, .. } => Ok(served.clone()),
            _ => Err(failure.of(name)),
        };
        self.by_name.insert(name.clone(), slot);
        answer(held, given);
    }
}

/// To those that waited, before anything else can take the model away again.
fn answer(held: Vec<Held>, answer: Result<Arc<Served>, ServingError>) {
    for held in held {
        let _ = held.send(answer.clone());
    }
}

fn ready_again(served: Arc<Served>, model: Pinned, why: String) -> Slot {
    served.set_leaving(false);
    Slot::Ready {
        served,
        model,
        not_replaced: Some(why),
    }
}

impl Turn for SlotTurn<'_> {
    fn is_wanted(&self) -> bool {
        let slots = self.serving.slots();
        match slots.by_name.get(&self.name) {
            Some(Slot::Loading(loading)) => loading.ticket == self.ticket && loading.is_wanted(),
            _ => false,
        }
    }

    fn commit(&self) {
        let mut slots = self.serving.slots();
        if let Some(Slot::Loading(loading)) = slots.by_name.get_mut(&self.name)
            && loading.ticket == self.ticket
        {
            loading.committed = true;
        }
    }

    /// First what the model replaces gives its memory, then the models that were not asked for longest. They keep it until
    /// their requests have ended, which is waited for.
    fn make_room(&self, station: &Arc<Station>, need: Need) -> Result<Reservation, LoadFailure> {
        let memory = &station.memory;
        memory.check(need).map_err(LoadFailure::TooLarge)?;
        let deadline = Instant::now() + self.serving.limits.hold;
        loop {
            if !self.is_wanted() {
                return Err(LoadFailure::Unwanted);
            }
            let most = self.serving.limits.max_points;
            let full = self.name.is_point() && self.serving.points() >= most;
            let took = match full {
                // Those that leave already are waited for.
                true => self.serving.slots().live_points() >= most && self.take_a_point(),
                false => {
                    if let Some(reservation) = memory.reserve(need) {
                        return Ok(reservation);
                    }
                    let parents = &station.parents;
                    // A point takes from its own parents only what it cannot do without: others leave in a moment.
                    (memory.needs_that_of_parents(need) && parents.let_go())
                        || !memory.will_fit(need)
                            && (self.take_from_another(station) || !self.name.is_point() && parents.let_go())
                }
            };
            if took {
                continue;
            }
            if Instant::now() > deadline {
                return Err(LoadFailure::NoRoom);
            }
            memory.wait(LOOK);
        }
    }
}

impl SlotTurn<'_> {
    /// A model is not served from now on, so that its memory of a device comes back; false if there is none.
    fn take_from_another(&self, station: &Arc<Station>) -> bool {
        let mut slots = self.serving.slots();
        match slots.by_name.get_mut(&self.name) {
            Some(Slot::Loading(loading)) if loading.ticket == self.ticket => {
                if loading.has_former_on(station) && loading.give_up_former() {
                    info!(model = %self.name, "what it replaces is unloaded first: there is no memory for both");
                    return true;
                }
            }
            _ => return false,
        }
        // What another name meant before its own load counts as that name's model.
        let there = slots.by_name.iter().filter_map(|(name, slot)| match slot {
            Slot::Ready { served, .. } if served.is_settling() || !served.is_on(station) => None,
            Slot::Ready { served, .. } => Some((served.standing(), name.clone())),
            Slot::Loading(Loading {
                former: Some(Former::Kept(served, _)),
                ..
            }) if served.is_on(station) => Some((served.standing(), name.clone())),
            _ => None,
        });
        let Some((_, name)) = there.min() else {
            return false;
        };
        if let Some(Slot::Loading(loading)) = slots.by_name.get_mut(&name) {
            return loading.give_up_former();
        }
        info!(model = %name, "is unloaded to make room for {}", self.name);
        slots.set_aside(name, None)
    }

    /// As [`Self::take_from_another`], of points only: there are as many as may be.
    fn take_a_point(&self) -> bool {
        let mut slots = self.serving.slots();
        let there = slots.by_name.iter().filter_map(|(name, slot)| match slot {
            Slot::Ready { served, .. } if name.is_point() && !served.is_settling() => {
                Some((served.standing(), name.clone()))
            }
            _ => None,
        });
        let Some((_, name)) = there.min() else {
            return false;
        };
        info!(point = %name, "makes room for {}", self.name);
        slots.drop_model(&name);
        true
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Weak;

    use super::super::SlotInfo;
    use super::*;

    fn model(source: &str) -> Pinned {
        let request = LoadRequest {
            weights: WeightsFrom::Folder {
                folder: source.into(),
                adapter: None,
                cached: None,
            },
            source: source.to_owned(),
            arithmetic: cauldron_lm::Arithmetic::F32,
            asked: Instant::now(),
        };
        Pinned::not_cached(request)
    }

    /// A slot that is loading, and what came of its load.
    fn settled(former: Option<Former>, origin: Origin, waits: bool, failure: LoadFailure) -> Settled {
        let mut slots = Slots::default();
        let name: ModelName = "m".parse().expect("a name");
        let (held, coming) = oneshot::channel();
        let held = if waits { vec![held] } else { Vec::new() };
        slots.enqueue(name.clone(), model("new"), former, origin, held);
        let Some(Slot::Loading(loading)) = slots.by_name.remove(&name) else {
            panic!("a slot that is loading");
        };
        slots.settle(&name, loading, Err(failure));
        Settled {
            info: slots.info(&name),
            coming,
        }
    }

    struct Settled {
        info: Option<SlotInfo>,
        coming: oneshot::Receiver<Result<Arc<Served>, ServingError>>,
    }

    impl Settled {
        fn is(&mut self, status: &str, source: &str, error: &str) {
            let info = self.info.as_ref().expect("a slot");
            assert_eq!((info.status, info.source.as_str()), (status, source));
            assert!(
                info.error.as_deref().unwrap_or_default().contains(error),
                "{info:?}"
            );
        }

        fn answer(&mut self) -> Option<ServingError> {
            self.coming.try_recv().ok().and_then(Result::err)
        }
    }

    fn broken() -> LoadFailure {
        LoadFailure::Broken("broken".to_owned())
    }

    #[test]
    fn what_had_to_make_room_for_a_failed_load_comes_back_with_the_reason_and_those_that_wait() {
        let leaving = || Some(Former::Leaving(Weak::new(), model("old")));
        let mut slot = settled(leaving(), Origin::Posted, true, broken());
        slot.is("loading", "old", "new could not be loaded in its place: broken");
        assert!(slot.answer().is_none(), "it still waits");
        // Nobody asked for one that was unloaded anyway.
        let unloaded = || Some(Former::Unloaded(model("old")));
        settled(unloaded(), Origin::Posted, false, broken()).is("unloaded", "old", "broken");
        settled(unloaded(), Origin::Posted, true, broken()).is("loading", "old", "broken");
    }

    #[test]
    fn what_may_pass_is_tried_again_when_it_is_asked_for() {
        for origin in [Origin::Again, Origin::InsteadOf("why".into())] {
            let mut slot = settled(None, origin, true, broken());
            slot.is("unloaded", "new", "broken");
            assert!(matches!(slot.answer(), Some(ServingError::Failed { .. })));
        }
        let mut slot = settled(None, Origin::Posted, true, LoadFailure::NoRoom);
        slot.is("unloaded", "new", "in use");
        assert!(matches!(slot.answer(), Some(ServingError::NoRoom(_))));
        settled(None, Origin::Posted, false, broken()).is("failed", "new", "broken");
    }

    #[test]
    fn what_only_requests_ask_for_is_wanted_as_long_as_one_waits() {
        let mut slot = settled(None, Origin::FirstUse, true, broken());
        assert!(slot.info.is_none(), "the name means nothing again");
        assert!(matches!(slot.answer(), Some(ServingError::Failed { .. })));
        settled(None, Origin::Again, false, LoadFailure::Unwanted).is("unloaded", "new", "");
        // One came after the load was given up.
        let mut slot = settled(None, Origin::Again, true, LoadFailure::Unwanted);
        slot.is("loading", "new", "");
        assert!(slot.answer().is_none());
    }
}
