//! The engine thread: the one thread that runs models. Others send it commands and get events back.

use std::collections::{HashMap, HashSet, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvError, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use cauldron_lm::{Decoder, DeviceCare, Engine, EngineConfig, Event, LmError, Request};
use tokio::sync::mpsc::UnboundedSender;
use tracing::error;

use super::memory::Reservation;
use crate::config::DeviceChoice;
use crate::failpoint;

/// What others ask of the engine thread. Admission is bounded by [`super::Served`], so the channel is.
pub(super) enum Command {
    Add {
        model: u64,
        /// Of the device's opening that it was made under.
        opening: u64,
        engine: Box<Engine>,
        decoder: Arc<Decoder>,
        config: EngineConfig,
        memory: Arc<Reservation>,
    },
    Remove {
        model: u64,
    },
    Submit {
        model: u64,
        request: Box<Request>,
        events: UnboundedSender<Event>,
    },
    Cancel {
        model: u64,
        request: u64,
    },
    /// Others found out that the device failed for good, under this opening.
    DeviceFailed {
        opening: u64,
    },
    Stop,
}

/// What the thread asks for when its device is in need.
pub(super) trait Faults: std::fmt::Debug + Send + Sync {
    /// There is no memory left. Whether some is free now, or will be once [`Command::Remove`] was heeded.
    fn make_room(&self, device: DeviceChoice) -> bool;
    /// The device failed for good, under this opening: nothing that it had can be used any more.
    fn lost(&self, device: DeviceChoice, opening: u64);
}

/// Handle of the thread. Dropping it ends the thread.
#[derive(Debug)]
pub struct EngineThread {
    commands: Sender<Command>,
    thread: Mutex<Option<JoinHandle<()>>>,
    counts: Arc<Counts>,
    stopped: AtomicBool,
}

/// What the thread tells of itself.
#[derive(Debug, Default)]
struct Counts {
    running: AtomicUsize,
    waiting: AtomicUsize,
    kv_used: AtomicUsize,
    kv_all: AtomicUsize,
}

/// How much the engine has to do, over all models.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Work {
    /// Sequences that run, and that wait.
    pub running: usize,
    pub waiting: usize,
    /// Tokens that requests have room for, and that there is room for.
    pub kv_used: usize,
    pub kv_all: usize,
}

impl std::iter::Sum for Work {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        let nothing = Self {
            running: 0,
            waiting: 0,
            kv_used: 0,
            kv_all: 0,
        };
        all.fold(nothing, |sum, work| Self {
            running: sum.running + work.running,
            waiting: sum.waiting + work.waiting,
            kv_used: sum.kv_used + work.kv_used,
            kv_all: sum.kv_all + work.kv_all,
        })
    }
}

/// One model on the thread.
struct Resident {
    opening: u64,
    decoder: Arc<Decoder>,
    engine: Engine,
    listeners: HashMap<u64, UnboundedSender<Event>>,
    config: EngineConfig,
    /// Given back last, after what it stands for.
    _memory: Arc<Reservation>,
}

struct Loop {
    models: HashMap<u64, Resident>,
    commands: Receiver<Command>,
    /// Commands that came while a model was being computed.
    later: VecDeque<Command>,
    counts: Arc<Counts>,
    device: DeviceChoice,
    faults: Arc<dyn Faults>,
    /// The last opening under which the device failed.
    lost: u64,
}

impl EngineThread {
    pub(super) fn start(device: DeviceChoice, faults: Arc<dyn Faults>) -> std::io::Result<Self> {
        let (commands, receiver) = channel();
        let counts = Arc::new(Counts::default());
        let state = Loop {
            models: HashMap::new(),
            commands: receiver,
            later: VecDeque::new(),
            counts: counts.clone(),
            device,
            faults,
            lost: 0,
        };
        let thread = std::thread::Builder::new()
            .name("engine".into())
            .spawn(move || state.run())?;
        Ok(Self {
            commands,
            thread: Mutex::new(Some(thread)),
            counts,
            stopped: AtomicBool::new(false),
        })
    }

    /// False once the thread has ended.
    pub(super) fn send(&self, command: Command) -> bool {
        !self.stopped.load(Ordering::Relaxed) && self.commands.send(command).is_ok()
    }

    pub fn work(&self) -> Work {
        let read = |count: &AtomicUsize| count.load(Ordering::Relaxed);
        Work {
            running: read(&self.counts.running),
            waiting: read(&self.counts.waiting),
            kv_used: read(&self.counts.kv_used),
            kv_all: read(&self.counts.kv_all),
        }
    }

    /// Ends the thread after the step it is in.
    pub fn shutdown(&self) {
        let _ = self.commands.send(Command::Stop);
        self.stopped.store(true, Ordering::Relaxed);
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        // Its last holder may be the thread itself, which hears of it when it is done.
        let other = |thread: &JoinHandle<()>| thread.thread().id() != std::thread::current().id();
        if let Some(thread) = thread.filter(other)
            && thread.join().is_err()
        {
            error!("the engine thread had panicked");
        }
    }
}

impl Drop for EngineThread {
    fn drop(&mut self) {
        self.shutdown();
    }
}

impl Loop {
    fn run(mut self) {
        loop {
            let busy = self.models.values().any(|model| !model.engine.is_idle());
            let next = match self.later.pop_front() {
                Some(command) => Ok(command),
                None if busy => self.commands.try_recv(),
                None => self
                    .commands
                    .recv()
                    .map_err(|RecvError| TryRecvError::Disconnected),
            };
            match next {
                Ok(Command::Stop) | Err(TryRecvError::Disconnected) => return,
                // Commands go first: a cancelled request must not cost another step.
                Ok(command) => self.take(command),
                Err(TryRecvError::Empty) => self.step(),
            }
            self.count();
        }
    }

    fn take(&mut self, command: Command) {
        match command {
            // It came too late: its requests are told.
            Command::Add { opening, .. } if opening <= self.lost => {}
            Command::Add {
                model,
                opening,
                engine,
                decoder,
                config,
                memory,
            } => {
                let resident = Resident {
                    opening,
                    decoder,
                    engine: *engine,
                    listeners: HashMap::new(),
                    config,
                    _memory: memory,
                };
                self.models.insert(model, resident);
            }
            Command::Remove { model } => {
                self.models.remove(&model);
            }
            Command::Cancel { model, request } => {
                if let Some(resident) = self.models.get_mut(&model) {
                    resident.engine.cancel(request);
                    resident.listeners.remove(&request);
                }
            }
            Command::Submit {
                model,
                request,
                events,
            } => {
                match self.models.get_mut(&model) {
                    Some(resident) => resident.submit(*request, events),
                    // Somebody still had it when its device failed.
                    None => {
                        let _ = events.send(device_failed(request.id));
                    }
                }
            }
            Command::DeviceFailed { opening } => self.give_up(opening),
            Command::Stop => {}
        }
    }

    /// One step of every model that has work, in turn.
    fn step(&mut self) {
        let has_work = |(id, model): (&u64, &Resident)| (!model.engine.is_idle()).then_some(*id);
        let busy: Vec<u64> = self.models.iter().filter_map(has_work).collect();
        for id in busy {
            // It is out of the map meanwhile, so that others can be taken out of it.
            let Some(mut resident) = self.models.remove(&id) else {
                continue;
            };
            let mut care = Care { thread: self };
            let stepped = catch_unwind(AssertUnwindSafe(|| resident.engine.step_with(&mut care)));
            let is_lost = resident.engine.is_lost();
            if is_lost {
                // Whoever hears of it and asks again is not to find the old model.
                self.faults.lost(self.device, resident.opening);
            }
            let opening = resident.opening;
            match stepped {
                Ok(events) => resident.deliver(events),
                Err(_) => {
                    error!("a step panicked; its model's requests fail and it starts afresh");
                    resident.fail_all();
                    match Engine::new(resident.decoder.clone(), resident.config) {
                        Ok(engine) => resident.engine = engine,
                        Err(e) => error!(error = %e, "it has no room for keys and values"),
                    }
                }
            }
            self.models.insert(id, resident);
            if is_lost {
                return self.give_up(opening);
            }
        }
    }

    /// The device failed: so do the requests of all models that were there.
    fn give_up(&mut self, opening: u64) {
        self.lost = self.lost.max(opening);
        let lost = self.models.extract_if(|_, model| model.opening <= opening);
        for (_, mut resident) in lost {
            for (id, listener) in resident.listeners.drain() {
                let _ = listener.send(device_failed(id));
            }
        }
    }

    fn count(&self) {
        let (mut running, mut waiting, mut used, mut all) = (0, 0, 0, 0);
        for engine in self.models.values().map(|model| &model.engine) {
            let (model_used, model_all) = engine.kv_usage();
            running += engine.running();
            waiting += engine.waiting();
            used += model_used;
            all += model_all;
        }
        self.counts.running.store(running, Ordering::Relaxed);
        self.counts.waiting.store(waiting, Ordering::Relaxed);
        self.counts.kv_used.store(used, Ordering::Relaxed);
        self.counts.kv_all.store(all, Ordering::Relaxed);
    }
}

/// Takes care of the device while a model is computed.
struct Care<'a> {
    thread: &'a mut Loop,
}

impl DeviceCare for Care<'_> {
    fn after(&mut self) -> Result<(), LmError> {
        match failpoint::fault("compute", self.thread.device) {
            Some(text) => Err(LmError::of_device(text)),
            None => Ok(()),
        }
    }

    fn make_room(&mut self) -> bool {
        let Loop {
            models,
            commands,
            later,
            device,
            faults,
            ..
        } = &mut *self.thread;
        if !faults.make_room(*device) {
            return false;
        }
        // Models that were unloaded go now, before what comes of them to others.
        later.extend(commands.try_iter());
        let removed = later.iter().filter_map(|command| match command {
            Command::Remove { model } => Some(*model),
            _ => None,
        });
        let removed: HashSet<u64> = removed.collect();
        models.retain(|id, _| !removed.contains(id));
        true
    }
}

impl Resident {
    fn submit(&mut self, request: Request, events: UnboundedSender<Event>) {
        let id = request.id;
        match self.engine.add(request) {
            Ok(()) => {
                self.listeners.insert(id, events);
            }
            Err(e) => {
                let field = match e {
                    LmError::Request { field, .. } => Some(field),
                    _ => None,
                };
                let _ = events.send(Event::Failed {
                    id,
                    error: e.to_string(),
                    field,
                });
            }
        }
    }

    fn deliver(&mut self, events: Vec<Event>) {
        for event in events {
            let (id, last) = match &event {
                Event::PromptLogprobs { id, .. } | Event::Token { id, .. } => (*id, false),
                Event::Finished { id, .. } | Event::Failed { id, .. } => (*id, true),
            };
            let gone = match self.listeners.get(&id) {
                Some(listener) => listener.send(event).is_err(),
                None => false,
            };
            if last {
                self.listeners.remove(&id);
            } else if gone {
                self.engine.cancel(id);
                self.listeners.remove(&id);
            }
        }
    }

    fn fail_all(&mut self) {
        for (id, listener) in self.listeners.drain() {
            let _ = listener.send(failed(id, "the model failed while computing"));
        }
    }
}

fn failed(id: u64, why: &str) -> Event {
    Event::Failed {
        id,
        error: why.to_owned(),
        field: None,
    }
}

fn device_failed(id: u64) -> Event {
    failed(id, "gpu-failed: the device failed and is opened anew")
}

/// Whether an event ends its request.
pub(super) fn is_last(event: &Event) -> bool {
    matches!(event, Event::Finished { .. } | Event::Failed { .. })
}
