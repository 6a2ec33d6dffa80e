//! Which of several devices a model goes to, and what is done where one runs out of memory or fails.

use std::sync::Arc;

use tracing::warn;

use super::engine::Command;
use super::load::LoadFailure;
use super::slot::{Former, Slot};
use super::station::Station;
use super::{LoadRequest, Served, Serving};
use crate::telemetry;

/// Where a load was tried.
pub(super) struct At {
    pub station: Arc<Station>,
    pub opening: u64,
}

impl Serving {
    /// The device with the most room, of those that are not out of order.
    pub(super) fn roomiest(&self) -> &Arc<Station> {
        let place = |station: &&Arc<Station>| (station.is_out(), std::cmp::Reverse(station.memory.left()));
        let roomiest = self.stations.iter().min_by_key(place);
        roomiest.unwrap_or(&self.stations[0])
    }

    /// The device that may have the most.
    pub(super) fn largest(&self) -> &Arc<Station> {
        let limit = |station: &Station| station.memory.limit().unwrap_or(u64::MAX);
        let place = |station: &&Arc<Station>| (station.is_out(), std::cmp::Reverse(limit(station)));
        let largest = self.stations.iter().min_by_key(place);
        largest.unwrap_or(&self.stations[0])
    }

    /// Takes memory from those on a device that do without it most easily: families' parents, or else the model without work
    /// that was not asked for longest. False if there is neither.
    pub(super) fn relieve(&self, station: &Arc<Station>) -> bool {
        let used = station.memory.used_bytes();
        // What merges are lent comes back too, but is hardly enough.
        let is_much = station.parents.holds_parents();
        if station.parents.let_go() && is_much {
            station.wait_below(used);
            return true;
        }
        let mut slots = self.slots();
        let there = slots.by_name.iter().filter_map(|(name, slot)| match slot {
            // One that somebody holds would keep its memory.
            Slot::Ready { served, .. } if served.is_on(station) && Arc::strong_count(served) == 1 => {
                Some((served.standing(), name.clone()))
            }
            _ => None,
        });
        match there.min() {
            Some(((false, _), name)) => {
                let device = station.choice();
                warn!(model = %name, %device, "is unloaded: the device is out of memory");
                metrics::counter!(telemetry::DEVICE_RELIEVED, "device" => device.to_string()).increment(1);
                slots.set_aside(name, None)
            }
            _ => false,
        }
    }

    /// Does what can be done about a load's failure. Where it may be tried once more, if that is of use.
    pub(super) fn help(
        &self,
        at: &At,
        failure: &LoadFailure,
        request: &LoadRequest,
    ) -> Option<&Arc<Station>> {
        match failure {
            LoadFailure::OutOfMemory(_) => {
                let used = at.station.memory.used_bytes();
                let any = self.relieve(&at.station);
                if any {
                    at.station.wait_below(used);
                }
                any.then(|| self.roomiest())
            }
            LoadFailure::DeviceLost(_) => {
                self.lose(&at.station, at.opening);
                let opening = at.opening;
                at.station.engine.send(Command::DeviceFailed { opening });
                Some(self.roomiest())
            }
            // Devices differ: the largest may have what it needs.
            LoadFailure::TooLarge(_) => {
                let limit = |station: &Station| station.memory.limit().unwrap_or(u64::MAX);
                let largest = self.largest();
                let is_larger = limit(largest) > limit(&at.station);
                (is_larger && !request.weights.is_point()).then_some(largest)
            }
            _ => None,
        }
    }

    /// A device failed under an opening: its models come back when they are asked for.
    pub(super) fn lose(&self, station: &Arc<Station>, opening: u64) {
        // Before the slots: a load that settles meanwhile sees it.
        station.fail(opening);
        let is_lost = |served: &Served| served.is_on(station) && !served.is_alive();
        let mut slots = self.slots();
        let mut there = Vec::new();
        for (name, slot) in &mut slots.by_name {
            match slot {
                Slot::Ready { served, .. } if is_lost(served) => there.push(name.clone()),
                Slot::Loading(loading) => {
                    if matches!(&loading.former, Some(Former::Kept(served, _)) if is_lost(served)) {
                        loading.give_up_former();
                    }
                }
                _ => {}
            }
        }
        for name in there {
            slots.set_aside(name, Some("its device failed".to_owned()));
        }
    }
}
