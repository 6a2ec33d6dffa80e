//! The scheduler against a storage that says what really lies in each block, under random work.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

/// Plays the engine: the "keys and values" of a token are the token itself.
struct World {
    scheduler: Scheduler,
    storage: Vec<[Option<u32>; BLOCK_TOKENS]>,
    /// Scores kept by block; the score of a token is the token.
    scores: Vec<[Option<u32>; BLOCK_TOKENS]>,
    jobs: BTreeMap<SequenceId, Job>,
    /// What each finished sequence drew.
    done: BTreeMap<SequenceId, Vec<u32>>,
    /// Prompt tokens that were run.
    prompt_tokens: usize,
    steps: usize,
}

struct Job {
    prompt: Vec<u32>,
    answer: usize,
    scores: Option<Scores>,
    /// Scores of tokens from `scores.from` on, as far as they are known.
    known: Vec<u32>,
    told: bool,
    drawn: Vec<u32>,
}

/// The token that follows a text: whatever way the text was run.
fn next_of(text: &[u32]) -> u32 {
    text.iter()
        .fold(17u32, |hash, token| hash.wrapping_mul(31).wrapping_add(*token))
        % 5
}

impl World {
    fn new(blocks: usize, max_batch_tokens: usize, max_running: usize) -> Self {
        let limits = Limits {
            max_batch_tokens,
            max_running,
        };
        Self {
            scheduler: Scheduler::new(limits, blocks),
            storage: vec![[None; BLOCK_TOKENS]; blocks],
            scores: vec![[None; BLOCK_TOKENS]; blocks],
            jobs: BTreeMap::new(),
            done: BTreeMap::new(),
            prompt_tokens: 0,
            steps: 0,
        }
    }

    fn add(&mut self, id: SequenceId, group: u64, prompt: &[u32], answer: usize, scores: Option<Scores>) {
        self.scheduler.add(id, group, prompt.to_vec(), scores);
        let job = Job {
            prompt: prompt.to_vec(),
            answer,
            scores,
            known: Vec::new(),
            told: false,
            drawn: Vec::new(),
        };
        self.jobs.insert(id, job);
    }

    fn step(&mut self) -> Plan {
        self.steps += 1;
        let plan = self.scheduler.plan();
        self.scheduler.check();
        assert!(
            !plan.shares.is_empty() || self.jobs.is_empty(),
            "work, but nothing to run"
        );
        for start in &plan.starts {
            let job = self.jobs.get_mut(&start.sequence).expect("a job");
            let Some(scores) = job.scores.filter(|_| !job.told) else {
                continue;
            };
            job.known.clear();
            for at in scores.from..start.found {
                let (block, slot) = (start.blocks[at / BLOCK_TOKENS], at % BLOCK_TOKENS);
                let score = self.scores[block as usize][slot].expect("a score is kept");
                assert_eq!(score, job.prompt[at], "the score of another token");
                job.known.push(score);
            }
        }
        for copy in &plan.copies {
            let source = self.storage[copy.from as usize];
            self.storage[copy.to as usize][..copy.tokens].copy_from_slice(&source[..copy.tokens]);
        }
        let mut rows = 0;
        for share in &plan.shares {
            let (tokens, table) = (
                self.scheduler.tokens(share.sequence),
                self.scheduler.table(share.sequence),
            );
            rows += share.range.len();
            assert!(!share.range.is_empty() && share.range.end <= tokens.len());
            for at in share.range.clone() {
                self.storage[table[at / BLOCK_TOKENS] as usize][at % BLOCK_TOKENS] = Some(tokens[at]);
            }
            if share.range.len() > 1 {
                self.prompt_tokens += share.range.len();
            }
        }
        assert!(
            rows <= self
                .scheduler
                .limits
                .max_batch_tokens
                .max(self.scheduler.running.len() + 1)
        );
        for share in &plan.shares {
            // All that a row sees is there, and is its own text.
            let (tokens, table) = (
                self.scheduler.tokens(share.sequence),
                self.scheduler.table(share.sequence),
            );
            for (at, token) in tokens[..share.range.end].iter().enumerate() {
                let stored = self.storage[table[at / BLOCK_TOKENS] as usize][at % BLOCK_TOKENS];
                assert_eq!(
                    stored,
                    Some(*token),
                    "position {at} of sequence {}",
                    share.sequence
                );
            }
        }
        for share in &plan.shares {
            self.ran(share);
        }
        self.scheduler.check();
        plan
    }

    fn ran(&mut self, share: &Share) {
        let id = share.sequence;
        let job = self.jobs.get_mut(&id).expect("a job");
        let mut scored = 0..0;
        if let Some(scores) = job.scores.filter(|_| !job.told) {
            let last = (share.range.end + 1).min(job.prompt.len());
            let from = scores.from + job.known.len();
            if from < last {
                assert!(
                    share.range.start < from,
                    "the row that scores token {from} is run"
                );
                job.known.extend(&job.prompt[from..last]);
            }
            scored = scores.from..scores.from + job.known.len();
        }
        for filled in self.scheduler.ran(share, scored) {
            if filled.keep_scores {
                for at in filled.scored {
                    self.scores[filled.block as usize][at % BLOCK_TOKENS] = Some(job.prompt[at]);
                }
            }
        }
        if !self.scheduler.is_through(id) {
            return;
        }
        if !job.told {
            if let Some(scores) = job.scores {
                assert_eq!(job.known, job.prompt[scores.from.min(job.prompt.len())..]);
            }
            job.told = true;
            self.scheduler.needs_no_scores(id);
        }
        if job.drawn.len() < job.answer {
            let token = next_of(self.scheduler.tokens(id));
            job.drawn.push(token);
            self.scheduler.push(id, token);
        }
        if job.drawn.len() == job.answer {
            self.scheduler.remove(id);
            let job = self.jobs.remove(&id).expect("a job");
            self.done.insert(id, job.drawn);
        }
    }

    fn run(&mut self) {
        while !self.jobs.is_empty() {
            self.step();
            assert!(self.steps < 100_000, "no end");
        }
        assert_eq!(self.scheduler.usage().0, 0);
    }
}

fn expected(prompt: &[u32], answer: usize) -> Vec<u32> {
    let mut text = prompt.to_vec();
    for _ in 0..answer {
        text.push(next_of(&text));
    }
    text.split_off(prompt.len())
}

/// One request of a random run: text from a few beginnings, so that prefixes are shared.
#[derive(Debug, Clone)]
struct Asked {
    group: u64,
    prompt: Vec<u32>,
    answer: usize,
    scores: Option<Scores>,
    /// Steps before the next one comes.
    pause: usize,
    /// Cancelled after so many steps.
    cancel: Option<usize>,
}

fn asked() -> impl Strategy<Value = Asked> {
    let prompt =
        (0u32..3, 0usize..50, proptest::collection::vec(0u32..3, 1..40)).prop_map(|(stem, length, own)| {
            let stem = (0..length).map(|i| (i as u32 * 7 + stem) % 5);
            stem.chain(own).collect::<Vec<u32>>()
        });
    let scores = proptest::option::of((1usize..60, 0usize..3).prop_map(|(from, top)| Scores { from, top }));
    let cancel = proptest::option::weighted(0.15, 0usize..20);
    (0u64..4, prompt, 0usize..40, scores, 0usize..4, cancel).prop_map(
        |(group, prompt, answer, scores, pause, cancel)| Asked {
            group,
            prompt,
            answer,
            scores,
            pause,
            cancel,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// Every sequence ends with the answer that it has alone, blocks are conserved and hold what they are said to,
    /// scores are never those of another text; with as few blocks as the longest text needs, and with many.
    #[test]
    fn any_work_ends_right(
        work in proptest::collection::vec(asked(), 1..25),
        blocks in 9usize..60,
        batch in 1usize..80,
        running in 1usize..9,
    ) {
        let mut world = World::new(blocks, batch, running);
        let mut cancels: Vec<(usize, SequenceId)> = Vec::new();
        for (id, asked) in work.iter().enumerate() {
            world.add(id as u64, asked.group, &asked.prompt, asked.answer, asked.scores);
            cancels.extend(asked.cancel.map(|steps| (world.steps + steps, id as u64)));
            for _ in 0..asked.pause {
                world.step();
                let now = world.steps;
                for (_, id) in cancels.extract_if(.., |(at, _)| *at <= now) {
                    world.scheduler.remove(id);
                    world.jobs.remove(&id);
                    world.scheduler.check();
                }
            }
        }
        world.run();
        for (id, drawn) in &world.done {
            let asked = &work[*id as usize];
            prop_assert_eq!(drawn, &expected(&asked.prompt, asked.answer));
        }
        world.scheduler.blocks.clear();
        prop_assert_eq!(world.scheduler.blocks.available(), blocks);
    }
}

fn text(length: usize, seed: u32) -> Vec<u32> {
    (0..length as u32).map(|i| i * 7919 + seed * 104_729).collect()
}

#[test]
fn a_common_beginning_is_run_once() {
    let mut world = World::new(200, 1000, 32);
    let context = text(100, 1);
    let scores = Some(Scores { from: 1, top: 1 });
    for id in 0..4 {
        let prompt = [&context[..], &text(10, 2 + id as u32)].concat();
        world.add(id, 0, &prompt, 1, scores);
    }
    world.run();
    // The first runs all, the others their own ten tokens and the one before them.
    assert_eq!(world.prompt_tokens, 110 + 3 * 11);
    assert_eq!(world.steps, 2);
}

#[test]
fn what_was_asked_before_is_still_there() {
    let mut world = World::new(50, 1000, 8);
    let scores = Some(Scores { from: 1, top: 3 });
    let prompt = text(70, 1);
    world.add(0, 0, &prompt, 0, scores);
    world.run();
    // As many likeliest tokens or fewer are known; more are not, nor are the scores of a text that was only read.
    for (id, top, tokens) in [(1, 3, 0), (2, 1, 0), (3, 5, 70), (4, 5, 0)] {
        world.prompt_tokens = 0;
        world.add(id, 0, &prompt, 0, Some(Scores { from: 1, top }));
        world.run();
        assert_eq!(world.prompt_tokens, tokens, "top {top}");
    }
    let read = text(40, 9);
    world.add(5, 0, &read, 1, None);
    world.run();
    world.prompt_tokens = 0;
    world.add(6, 0, &read, 0, Some(Scores { from: 30, top: 0 }));
    world.run();
    assert_eq!(world.prompt_tokens, 40 - 29);
}

#[test]
fn a_short_question_does_not_wait_for_a_large_batch() {
    let mut world = World::new(4000, 100, 16);
    for id in 0..200 {
        world.add(id, 1, &text(150, id as u32), 4, None);
    }
    for _ in 0..10 {
        world.step();
    }
    world.add(1000, 2, &text(50, 1000), 3, None);
    let asked = world.steps;
    while !world.done.contains_key(&1000) {
        world.step();
    }
    assert!(world.steps - asked <= 4, "it took {} steps", world.steps - asked);
    // Nor does the batch stop while short questions keep coming.
    let before = world.done.len();
    for id in 2000..2050 {
        world.add(id, id, &text(60, id as u32), 1, None);
        world.step();
        world.step();
    }
    assert!(world.done.len() - before > 70, "{}", world.done.len() - before);
}

#[test]
fn long_answers_of_a_batch_leave_places_to_others() {
    let mut world = World::new(4000, 100, 8);
    for id in 0..20 {
        world.add(id, 1, &text(5, id as u32), 500, None);
    }
    for _ in 0..5 {
        world.step();
    }
    world.add(100, 2, &text(5, 100), 3, None);
    for _ in 0..4 {
        world.step();
    }
    assert!(world.done.contains_key(&100));
}

#[test]
fn sequences_that_are_sent_back_go_on_where_they_were() {
    // Twelve blocks: three texts of 64 tokens do not fit at once.
    let mut world = World::new(9, 64, 8);
    for id in 0..3 {
        world.add(id, id, &text(20, id as u32), 50, None);
    }
    world.run();
    for id in 0..3 {
        assert_eq!(world.done[&id], expected(&text(20, id as u32), 50));
    }
}

/// More comes than can be run, without end: nobody is overtaken for ever, neither by position nor by size.
#[test]
fn under_overload_each_comes_to_its_turn() {
    let mut world = World::new(4096, 16, 512);
    let mut ended = BTreeMap::new();
    let mut came = BTreeMap::new();
    world.add(0, 0, &text(48, 900), 1, None);
    for step in 0..400 {
        for _ in 0..2 {
            let id = came.len() as u64 + 1;
            came.insert(id, step);
            world.add(id, id, &text(12, id as u32), 1, None);
        }
        world.step();
        for id in world.done.keys() {
            ended.entry(*id).or_insert(step);
        }
    }
    // Two thirds of what comes can be run, so the wait grows, but for all of them alike.
    let late = |id: u64| ended.get(&id).map(|end| end - came[&id]);
    assert!(
        (1..450).all(|id| late(id).is_some()),
        "one of the first 450 of 800 has not ended"
    );
    for id in 1..430 {
        let (own, later) = (late(id), late(id + 20));
        assert!(
            own <= later.map(|wait| wait + 10),
            "{id}: {own:?} steps, {later:?} for one that came later"
        );
    }
    assert!(ended.contains_key(&0), "the long prompt has not ended");
}

/// A prompt that needs most of the blocks, while short ones that would fit keep coming.
#[test]
fn one_that_waits_for_blocks_is_not_overtaken_for_ever() {
    let mut world = World::new(12, 64, 8);
    for id in 1..5 {
        world.add(id, id, &text(30, id as u32), 6, None);
    }
    world.step();
    world.add(0, 0, &text(160, 900), 4, None);
    for id in 10..200 {
        world.add(id, id, &text(20, id as u32), 3 + (id % 5) as usize * 2, None);
        world.step();
        if world.done.contains_key(&0) {
            return;
        }
    }
    panic!("it has not ended after {} others", world.done.len());
}
