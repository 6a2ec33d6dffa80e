//! The engine thread: the one thread that runs models. Others send it commands and get events back.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvError, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use cauldron_lm::{Decoder, Engine, EngineConfig, Event, LmError, Request};
use tokio::sync::mpsc::UnboundedSender;
use tracing::error;

use super::ServingLimits;
use super::memory::Reservation;

/// What others ask of the engine thread. Admission is bounded by [`super::Served`], so the channel is.
pub(super) enum Command {
    Add {
        model: u64,
        decoder: Arc<Decoder>,
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
    Stop,
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

/// One model on the thread.
struct Resident {
    decoder: Arc<Decoder>,
    engine: Engine,
    listeners: HashMap<u64, UnboundedSender<Event>>,
    config: EngineConfig,
    /// Given back last, after what it stands for.
    _memory: Arc<Reservation>,
}

struct Loop {
    models: HashMap<u64, Resident>,
    limits: ServingLimits,
    counts: Arc<Counts>,
}

impl EngineThread {
    pub fn start(limits: ServingLimits) -> std::io::Result<Self> {
        let (commands, receiver) = channel();
        let counts = Arc::new(Counts::default());
        let state = Loop {
            models: HashMap::new(),
            limits,
            counts: counts.clone(),
        };
        let thread = std::thread::Builder::new()
            .name("engine".into())
            .spawn(move || state.run(&receiver))?;
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
        if let Some(thread) = thread
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
    fn run(mut self, commands: &Receiver<Command>) {
        loop {
            let busy = self.models.values().any(|model| !model.engine.is_idle());
            let next = match busy {
                true => commands.try_recv(),
                false => commands.recv().map_err(|RecvError| TryRecvError::Disconnected),
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
            Command::Add {
                model,
                decoder,
                memory,
            } => {
                let config = EngineConfig {
                    max_batch_tokens: self.limits.max_batch_tokens,
                    max_running: self.limits.max_running,
                    kv_bytes: memory.kv_bytes as usize,
                };
                let engine = match Engine::new(decoder.clone(), config) {
                    Ok(engine) => engine,
                    // Its requests are told that it has gone.
                    Err(e) => return error!(error = %e, "a model has no room for keys and values"),
                };
                let resident = Resident {
                    decoder,
                    engine,
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
                // Without the model, dropping `events` tells the waiting side.
                if let Some(resident) = self.models.get_mut(&model) {
                    resident.submit(*request, events);
                }
            }
            Command::Stop => {}
        }
    }

    /// One step of every model that has work, in turn.
    fn step(&mut self) {
        for resident in self.models.values_mut().filter(|m| !m.engine.is_idle()) {
            let stepped = catch_unwind(AssertUnwindSafe(|| resident.engine.step()));
            match stepped {
                Ok(events) => resident.deliver(events),
                Err(_) => {
                    error!("a step panicked; its model's requests fail and it starts afresh");
                    resident.fail_all("the model failed while computing");
                    match Engine::new(resident.decoder.clone(), resident.config) {
                        Ok(engine) => resident.engine = engine,
                        Err(e) => error!(error = %e, "it has no room for keys and values"),
                    }
                }
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

    fn fail_all(&mut self, detail: &str) {
        for (id, listener) in self.listeners.drain() {
            let _ = listener.send(Event::Failed {
                id,
                error: detail.to_owned(),
                field: None,
            });
        }
    }
}

/// Whether an event ends its request.
pub(super) fn is_last(event: &Event) -> bool {
    matches!(event, Event::Finished { .. } | Event::Failed { .. })
}
