//! One sweep from its first trial, or the first that is left, to its verdict.

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

use cauldron_lm::Arithmetic;
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::judge::{Found, gain, is_clearly_worse, is_noise, metrics, of_scores, pareto, selected};
use super::plan::{Tried, baselines, next};
use super::{Given, Origin, Status, Sweep, Sweeps, Trial, Verdict, Waiting, cma};
use crate::config::ModelName;
use crate::eval::{Outcome, Task};
use crate::serving::{Family, OpenRecipe, Served, ServingError, Shares};

/// The race looks at one in so many of the dev items.
const HEAT: usize = 3;
/// How long a trial waits for a score from outside.
const LONGEST_WAIT: Duration = Duration::from_hours(24);

/// One task's items, parted.
struct Parts {
    /// The first third of the dev items, and the others; the second is empty without a race.
    heat: Arc<Task>,
    rest: Arc<Task>,
    test: Arc<Task>,
}

impl Parts {
    fn of(task: &Task, sweep: &Sweep) -> Self {
        let is_dev = sweep.split.of(task);
        let dev: Vec<usize> = (0..is_dev.len()).filter(|index| is_dev[*index]).collect();
        let first = match sweep.race {
            true => dev.len().div_ceil(HEAT),
            false => dev.len(),
        };
        let mut is_first = vec![false; is_dev.len()];
        dev.iter().take(first).for_each(|index| is_first[*index] = true);
        // Scores are all that a sweep wants.
        let task = task.hasty();
        Self {
            heat: Arc::new(task.subset(&|index| is_first[index])),
            rest: Arc::new(task.subset(&|index| is_dev[index] && !is_first[index])),
            test: Arc::new(task.subset(&|index| !is_dev[index])),
        }
    }
}

impl Sweeps {
    /// The sweep as it ended.
    pub(super) async fn run(self: &Arc<Self>, mut sweep: Sweep, cancel: &CancellationToken) -> Sweep {
        let ended = match self.try_all(&mut sweep, cancel).await {
            _ if cancel.is_cancelled() => Ok(Status::Cancelled),
            ended => ended,
        };
        if let Some(name) = family_name(&sweep) {
            let _ = self.serving.unload(&name);
        }
        sweep.waiting = None;
        match ended {
            Ok(status) => sweep.status = status,
            Err(detail) => {
                sweep.status = Status::Failed;
                sweep.error = Some(detail);
            }
        }
        sweep
    }

    async fn try_all(
        self: &Arc<Self>,
        sweep: &mut Sweep,
        cancel: &CancellationToken,
    ) -> Result<Status, String> {
        let (store, id) = (self.store.clone(), sweep.id);
        let of = sweep.clone();
        let parted = tokio::task::spawn_blocking(move || {
            let tasks = store.tasks(id)?;
            Some(
                tasks
                    .iter()
                    .map(|task| Parts::of(task, &of))
                    .collect::<Vec<Parts>>(),
            )
        });
        let parted = parted.await.map_err(|e| e.to_string())?;
        let parts = parted.ok_or("its items cannot be read")?;
        let recipe = OpenRecipe::new(sweep.recipe.clone()).map_err(|e| e.to_string())?;
        let name = family_name(sweep).ok_or("it has no name")?;
        self.serving
            .load_family(
                name.clone(),
                recipe,
                Arithmetic::F32,
                self.parentage.clone(),
                None,
            )
            .map_err(|e| e.to_string())?;
        let family = self.serving.family(&name).ok_or("its family has gone")?;
        or_cancelled(cancel, family.ready())
            .await?
            .map_err(|e| e.to_string())?;
        sweep.status = Status::Running;
        self.note(sweep).await?;
        // Outcomes of the best so far, for the race.
        let mut leader = self.leader(sweep, &parts).await;
        let mut ahead = None;
        loop {
            let n = sweep.trials.len();
            let planned = next_of(sweep, &tried(sweep));
            let Some((shares, origin)) = planned else { break };
            let start = Instant::now();
            // The next weights are computed while this trial is asked, where they are known and there is room for both.
            let coming = async {
                match ahead.take() {
                    Some((known, waiting)) if known == shares => match joined(waiting).await {
                        Ok(served) => Ok(served),
                        // What stood in its way may have gone.
                        Err(_) => self.point(&family, &shares).await,
                    },
                    _ => self.point(&family, &shares).await,
                }
            };
            let served = or_cancelled(cancel, coming).await?;
            let has_room = served
                .as_ref()
                .is_ok_and(|served| self.serving.has_room_beside(served));
            if has_room
                && !sweep.external
                && let Some((next_shares, _)) = foreseen(sweep, &(shares.clone(), origin.clone()))
            {
                let (this, family, of) = (self.clone(), family.clone(), next_shares.clone());
                ahead = Some((
                    next_shares,
                    tokio::spawn(async move { this.point_once(&family, &of).await }),
                ));
            }
            let mut trial = Trial {
                n,
                shares,
                origin,
                system_fingerprint: served.as_ref().ok().map(|served| served.fingerprint.clone()),
                dev: Vec::new(),
                test: Vec::new(),
                score: None,
                stderr: None,
                dropped: false,
                error: None,
                seconds: 0.0,
            };
            let asked = match &served {
                Ok(served) if sweep.external => self.wait_for_score(sweep, served, &mut trial, cancel).await,
                Ok(served) => {
                    let trying = self.try_one(sweep, served, &parts, &mut trial, &mut leader);
                    or_cancelled(cancel, trying).await?
                }
                Err(detail) => Err(detail.clone()),
            };
            if cancel.is_cancelled() {
                return Ok(Status::Cancelled);
            }
            if let Err(detail) = asked {
                warn!(sweep = %sweep.id, trial = n, error = detail, "a trial failed");
                trial.error = Some(detail);
            }
            trial.seconds = start.elapsed().as_secs_f64();
            sweep.trials.push(trial);
            self.note(sweep).await?;
        }
        or_cancelled(cancel, self.judge(sweep, &family, &parts)).await??;
        Ok(Status::Done)
    }

    /// The best trial of an earlier run, from what is kept of it.
    async fn leader(&self, sweep: &Sweep, parts: &[Parts]) -> Option<(f64, Found)> {
        let scored = sweep
            .trials
            .iter()
            .filter_map(|trial| Some((trial.score?, trial)));
        let (score, trial) = scored.reduce(|best, other| if other.0 > best.0 { other } else { best })?;
        let dev = |part: &Parts| vec![part.heat.clone(), part.rest.clone()];
        let found = self.recalled(trial, parts.iter().map(dev)).await?;
        Some((score, found))
    }

    /// What a trial's weights did with tasks, each in some pieces, if all of it is kept.
    async fn recalled(&self, trial: &Trial, tasks: impl Iterator<Item = Vec<Arc<Task>>>) -> Option<Found> {
        let fingerprint = trial.system_fingerprint.as_deref()?;
        let mut found = Found::new();
        for pieces in tasks {
            let mut outcomes = Vec::new();
            for task in pieces.iter().filter(|task| !task.items.is_empty()) {
                let known = self.evals.known(fingerprint, task.digest, task.items.len()).await;
                outcomes.extend(known.ok()??.iter().cloned());
            }
            found.push(outcomes);
        }
        Some(found)
    }

    async fn note(&self, sweep: &Sweep) -> Result<(), String> {
        self.save(sweep)
            .await
            .map_err(|e| format!("it cannot be kept: {e}"))
    }

    async fn point(&self, family: &Arc<Family>, shares: &Shares) -> Result<Arc<Served>, String> {
        let mut tries = 0;
        loop {
            match self.point_or_why(family, shares).await {
                Ok(served) => return Ok(served),
                // Others use the memory now.
                Err(e) if tries < 10 && e.may_pass() => {
                    tries += 1;
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
                Err(e) => return Err(e.to_string()),
            }
        }
    }

    async fn point_once(&self, family: &Arc<Family>, shares: &Shares) -> Result<Arc<Served>, String> {
        self.point_or_why(family, shares).await.map_err(|e| e.to_string())
    }

    async fn point_or_why(&self, family: &Arc<Family>, shares: &Shares) -> Result<Arc<Served>, ServingError> {
        let served = self.serving.point(family.clone(), shares).await?;
        let now = self.serving.family(&family.name);
        match now.is_some_and(|now| Arc::ptr_eq(&now, family)) {
            true => Ok(served),
            // Somebody has taken the sweep's name.
            false => Err(ServingError::Unknown(family.name.to_string())),
        }
    }

    async fn ask(&self, served: &Arc<Served>, task: &Arc<Task>) -> Result<Vec<Outcome>, String> {
        if task.items.is_empty() {
            return Ok(Vec::new());
        }
        let found = self.evals.outcomes(served, task, &AtomicUsize::new(0)).await;
        Ok(found.map_err(|e| e.to_string())?.to_vec())
    }

    async fn ask_test(&self, served: &Arc<Served>, parts: &[Parts]) -> Result<Found, String> {
        let mut found = Found::new();
        for part in parts {
            found.push(self.ask(served, &part.test).await?);
        }
        Ok(found)
    }

    async fn try_one(
        &self,
        sweep: &Sweep,
        served: &Arc<Served>,
        parts: &[Parts],
        trial: &mut Trial,
        leader: &mut Option<(f64, Found)>,
    ) -> Result<(), String> {
        let mut found = Found::new();
        for part in parts {
            found.push(self.ask(served, &part.heat).await?);
        }
        if sweep.race && !trial.origin.is_baseline() && is_clearly_worse(sweep, &found, leader.as_ref()) {
            trial.dropped = true;
            trial.dev = metrics(sweep, &found)?;
            return Ok(());
        }
        for (part, found) in parts.iter().zip(&mut found) {
            found.extend(self.ask(served, &part.rest).await?);
        }
        trial.dev = metrics(sweep, &found)?;
        if let Some((score, stderr)) = selected(sweep.select, &sweep.tasks, &trial.dev) {
            (trial.score, trial.stderr) = (Some(score), stderr);
            if leader.as_ref().is_none_or(|(best, _)| score > *best) {
                *leader = Some((score, found));
            }
        }
        // All baselines are told of: while their weights are there.
        if trial.origin.is_baseline() {
            trial.test = metrics(sweep, &self.ask_test(served, parts).await?)?;
        }
        Ok(())
    }

    /// Somebody else scores it.
    async fn wait_for_score(
        &self,
        sweep: &mut Sweep,
        served: &Served,
        trial: &mut Trial,
        cancel: &CancellationToken,
    ) -> Result<(), String> {
        sweep.waiting = Some(Waiting {
            trial: trial.n,
            shares: trial.shares.clone(),
            model: served.name.to_string(),
        });
        self.note(sweep).await?;
        let given = tokio::time::timeout(LONGEST_WAIT, self.given(sweep.id, trial.n));
        let given = or_cancelled(cancel, given).await;
        sweep.waiting = None;
        match given? {
            Ok(Some(Given::Score { score, stderr })) => {
                (trial.score, trial.stderr) = (Some(score), stderr);
                Ok(())
            }
            Ok(Some(Given::Tasks(given))) => {
                if sweep.tasks.is_empty() {
                    sweep.tasks = given.iter().map(|(task, _)| task.clone()).collect();
                }
                trial.dev = given.into_iter().map(|(_, metric)| metric).collect();
                if let Some((score, stderr)) = selected(sweep.select, &sweep.tasks, &trial.dev) {
                    (trial.score, trial.stderr) = (Some(score), stderr);
                }
                Ok(())
            }
            Ok(Some(Given::Failed(detail))) => Err(detail),
            Ok(None) | Err(_) => Err("nobody gave its score".into()),
        }
    }

    /// The winner, the best of what was searched, and the baselines on test items.
    async fn judge(&self, sweep: &mut Sweep, family: &Arc<Family>, parts: &[Parts]) -> Result<(), String> {
        let best = |trials: &[Trial], which: &dyn Fn(&Trial) -> bool| {
            let scored = trials
                .iter()
                .filter(|trial| which(trial) && trial.score.is_some());
            // The first of equals.
            scored
                .fold(None, |best: Option<&Trial>, trial| match best {
                    Some(best) if best.score >= trial.score => Some(best),
                    _ => Some(trial),
                })
                .map(|trial| trial.n)
        };
        let winner = best(&sweep.trials, &|_| true).ok_or("no trial could be scored")?;
        let baseline = best(&sweep.trials, &|trial| trial.origin.is_baseline()).unwrap_or(winner);
        if sweep.external {
            sweep.verdict = Some(of_scores(sweep, winner, baseline));
            return Ok(());
        }
        let searched = best(&sweep.trials, &|trial| !trial.origin.is_baseline());
        let mut found: Vec<(usize, Found)> = Vec::new();
        let to_test: Vec<usize> = sweep
            .trials
            .iter()
            .filter(|trial| {
                let baseline = trial.origin.is_baseline() && trial.score.is_some();
                baseline || trial.n == winner || Some(trial.n) == searched
            })
            .map(|trial| trial.n)
            .collect();
        for n in to_test {
            let test = |part: &Parts| vec![part.test.clone()];
            let outcomes = match self.recalled(&sweep.trials[n], parts.iter().map(test)).await {
                Some(outcomes) => outcomes,
                None => {
                    let served = self.point(family, &sweep.trials[n].shares).await?;
                    self.ask_test(&served, parts).await?
                }
            };
            sweep.trials[n].test = metrics(sweep, &outcomes)?;
            found.push((n, outcomes));
        }
        let of = |n: usize| {
            found
                .iter()
                .find(|(known, _)| *known == n)
                .map(|(_, found)| found)
        };
        let (test_gain, test_gain_stderr) = match (of(winner), of(baseline)) {
            (Some(ours), Some(theirs)) => gain(sweep, ours, theirs),
            _ => (0.0, None),
        };
        sweep.verdict = Some(Verdict {
            winner,
            baseline,
            test_gain,
            test_gain_stderr,
            within_noise: is_noise(test_gain, test_gain_stderr),
            pareto: pareto(sweep),
        });
        Ok(())
    }
}

/// What comes first: what is waited for, or the end of the sweep.
async fn or_cancelled<T>(cancel: &CancellationToken, work: impl Future<Output = T>) -> Result<T, String> {
    let done = cancel.run_until_cancelled(work).await;
    done.ok_or_else(|| "cancelled".to_owned())
}

/// The family that serves a sweep's trials.
fn family_name(sweep: &Sweep) -> Option<ModelName> {
    format!("sweep-{}", sweep.id).parse().ok()
}

async fn joined(
    waiting: tokio::task::JoinHandle<Result<Arc<Served>, String>>,
) -> Result<Arc<Served>, String> {
    waiting.await.unwrap_or_else(|e| Err(e.to_string()))
}

/// What is tried after these: a baseline that is not there yet, then what the search says.
fn next_of(sweep: &Sweep, tried: &[Tried]) -> Option<(Shares, Origin)> {
    let is_missing = |(shares, _): &(Shares, Origin)| {
        let is_it = |trial: &Tried| trial.origin.is_baseline() && trial.shares == *shares;
        !tried.iter().any(is_it)
    };
    let baseline = baselines(&sweep.recipe).into_iter().find(is_missing);
    baseline.or_else(|| next(&sweep.search, sweep.seed, sweep.parents, tried))
}

/// What comes after the trial that is being asked, where that does not depend on its score.
fn foreseen(sweep: &Sweep, asked: &(Shares, Origin)) -> Option<(Shares, Origin)> {
    let has_baselines = baselines(&sweep.recipe).len() <= sweep.trials.len() + 1;
    if has_baselines && matches!(sweep.search, super::Search::Bayes { .. }) {
        return None;
    }
    let mut known = tried(sweep);
    known.push(Tried {
        shares: asked.0.clone(),
        origin: asked.1.clone(),
        score: None,
        stderr: None,
        heat: None,
    });
    let coming = next_of(sweep, &known)?;
    let own = known.iter().filter(|trial| !trial.origin.is_baseline()).count();
    let learns = match &sweep.search {
        super::Search::Bayes { .. } => true,
        super::Search::M3 { alphas, .. } => own >= alphas.len(),
        super::Search::Cma { groups, .. } => own > 0 && cma::ends_generation(*groups as usize, own),
        super::Search::Grid { .. } | super::Search::Random { .. } => false,
    };
    (coming.1.is_baseline() || !learns).then_some(coming)
}

fn tried(sweep: &Sweep) -> Vec<Tried> {
    let each = sweep.trials.iter().map(|trial| Tried {
        shares: trial.shares.clone(),
        origin: trial.origin.clone(),
        score: trial.score,
        stderr: trial.stderr,
        heat: trial
            .dropped
            .then(|| selected(sweep.select, &sweep.tasks, &trial.dev))
            .flatten()
            .map(|(score, _)| score),
    });
    each.collect()
}
