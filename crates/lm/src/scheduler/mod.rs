//! What runs in each step: iteration-level scheduling of sequences over blocks of keys and values, as a pure state
//! machine. It knows tokens and blocks, but no model: [`crate::Engine`] runs what [`Scheduler::plan`] says, then tells
//! what came of it.
//!
//! - Every answer that runs gets its next token in every step; what room is left goes to prompts, cut into chunks.
//! - Room goes to the group (the requests of one client) that has had least of it, counted from what all had when it came:
//!   a large batch does not hold up a short question, and those that come later do not overtake for ever. A prompt that one
//!   step can finish is finished first. Within a group it is first come, first served. Who cannot begin for want of blocks
//!   is not overtaken by those that need fewer.
//! - A prompt that begins as another one does takes over its blocks; one that is about to, waits for it.
//! - When blocks run out, the sequence that began last gives its own back and runs again later, from the beginning or
//!   what is left of it. The oldest is never sent back, so that the work always ends.

mod blocks;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;

use crate::kv::BLOCK_TOKENS;

use blocks::Blocks;
pub(crate) use blocks::{Block, Scores};

pub(crate) type SequenceId = u64;

/// Parts of a token that the clock counts in: many groups have a right to less than one in a step.
const UNIT: u64 = 1 << 20;
/// A prompt waits for another one that is being run if that saves it so many tokens.
const WORTH_WAITING: usize = 8;

/// Limits of one step and of all.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub max_batch_tokens: usize,
    pub max_running: usize,
}

#[derive(Debug)]
pub(crate) struct Scheduler {
    limits: Limits,
    blocks: Blocks,
    groups: BTreeMap<u64, Group>,
    sequences: BTreeMap<SequenceId, Sequence>,
    /// In the order in which they began.
    running: Vec<SequenceId>,
    /// Prompt tokens that each group with prompts has had a right to so far (times [`UNIT`]): where a new one begins.
    clock: u64,
}

/// The sequences of one client.
#[derive(Debug, Default)]
struct Group {
    waiting: VecDeque<SequenceId>,
    /// Prompt tokens that it was given (times [`UNIT`]), counted from the clock when it came.
    served: u64,
    /// Whether it was given any.
    begun: bool,
    running: usize,
    sequences: usize,
}

/// What is known of a step while prompts are chosen for it.
#[derive(Debug)]
struct Turns {
    /// Sequences that run in it already, or cannot.
    passed: BTreeSet<SequenceId>,
    may_begin: bool,
    /// Groups of which nobody can begin.
    idle: BTreeSet<u64>,
}

#[derive(Debug)]
struct Sequence {
    group: u64,
    /// The prompt and what was drawn.
    tokens: Vec<u32>,
    /// Tokens whose keys and values are in the blocks.
    computed: usize,
    blocks: Vec<Block>,
    scores: Option<Scores>,
}

/// Tokens of one sequence that run in a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Share {
    pub sequence: SequenceId,
    /// Positions in the sequence.
    pub range: Range<usize>,
}

/// The beginning of a block that a sequence takes over as its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Copy {
    pub from: Block,
    pub to: Block,
    pub tokens: usize,
}

/// A sequence that begins, or begins again, with tokens that were there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Start {
    pub sequence: SequenceId,
    /// Where its first `found` tokens, and their scores if it needs any, were found, block by block.
    pub blocks: Vec<Block>,
    pub found: usize,
}

/// One step. To be done in this order: what starts reads the scores of its blocks, copies are made, shares are run.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    pub starts: Vec<Start>,
    pub copies: Vec<Copy>,
    pub shares: Vec<Share>,
}

/// What became of a block when tokens were put into it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Filled {
    pub block: Block,
    /// Positions of the sequence's tokens in the block of which scores are known.
    pub scored: Range<usize>,
    /// Whether the block's scores are to be kept: they are new, or better than what is kept.
    pub keep_scores: bool,
}

impl Scheduler {
    pub fn new(limits: Limits, blocks: usize) -> Self {
        Self {
            limits: Limits {
                max_batch_tokens: limits.max_batch_tokens.max(1),
                max_running: limits.max_running.max(1),
            },
            blocks: Blocks::new(blocks),
            groups: BTreeMap::new(),
            sequences: BTreeMap::new(),
            running: Vec::new(),
            clock: 0,
        }
    }

    pub fn running(&self) -> usize {
        self.running.len()
    }

    pub fn waiting(&self) -> usize {
        self.sequences.len() - self.running.len()
    }

    /// Blocks that sequences use, and all of them.
    pub fn usage(&self) -> (usize, usize) {
        (self.blocks.used(), self.blocks.count())
    }

    /// Tokens of a sequence: prompt, then what was drawn.
    pub fn tokens(&self, id: SequenceId) -> &[u32] {
        self.sequences.get(&id).map_or(&[], |s| &s.tokens)
    }

    pub fn table(&self, id: SequenceId) -> &[Block] {
        self.sequences.get(&id).map_or(&[], |s| &s.blocks)
    }

    /// Whether all tokens of a sequence have been run, so that its next one can be drawn.
    pub fn is_through(&self, id: SequenceId) -> bool {
        self.sequences
            .get(&id)
            .is_some_and(|s| s.computed == s.tokens.len())
    }

    /// Queues a prompt, which is not empty and whose longest text fits into all blocks.
    pub fn add(&mut self, id: SequenceId, group: u64, prompt: Vec<u32>, scores: Option<Scores>) {
        let entry = self.groups.entry(group).or_insert_with(|| Group {
            served: self.clock,
            ..Group::default()
        });
        entry.waiting.push_back(id);
        entry.sequences += 1;
        let sequence = Sequence {
            group,
            tokens: prompt,
            computed: 0,
            blocks: Vec::new(),
            scores,
        };
        self.sequences.insert(id, sequence);
    }

    /// Puts a drawn token behind a sequence; it runs in the next step.
    pub fn push(&mut self, id: SequenceId, token: u32) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.tokens.push(token);
        }
    }

    /// The scores of a sequence have been given out: it needs none when it has to begin again.
    pub fn needs_no_scores(&mut self, id: SequenceId) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.scores = None;
        }
    }

    /// Ends a sequence, whatever its state. False if there is none.
    pub fn remove(&mut self, id: SequenceId) -> bool {
        let Some(sequence) = self.sequences.remove(&id) else {
            return false;
        };
        let ran = self.running.contains(&id);
        self.running.retain(|other| *other != id);
        if let Some(group) = self.groups.get_mut(&sequence.group) {
            match ran {
                true => group.running -= 1,
                false => group.waiting.retain(|other| *other != id),
            }
            group.sequences -= 1;
            if group.sequences == 0 {
                self.groups.remove(&sequence.group);
            }
        }
        // The last block first: what is at the end of a text is of use to fewer others.
        sequence
            .blocks
            .iter()
            .rev()
            .for_each(|block| self.blocks.release(*block));
        true
    }

    /// What to run now. Empty only if there is nothing to do.
    pub fn plan(&mut self) -> Plan {
        let mut plan = Plan::default();
        self.plan_answers(&mut plan);
        self.plan_prompts(&mut plan);
        plan
    }

    /// One token of every answer; the last that began make room if there is none.
    fn plan_answers(&mut self, plan: &mut Plan) {
        let mut next = 0;
        while let Some(id) = self.running.get(next).copied() {
            let left = self.left(id);
            if left == 1 {
                if !self.make_room(id, 1) {
                    // It was the last itself, and waits now.
                    continue;
                }
                let computed = self.sequences[&id].computed;
                plan.shares.push(Share {
                    sequence: id,
                    range: computed..computed + 1,
                });
            }
            next += 1;
        }
    }

    /// Tokens that are to be run.
    fn left(&self, id: SequenceId) -> usize {
        self.sequences.get(&id).map_or(0, |s| s.tokens.len() - s.computed)
    }

    /// Gets the blocks for the next `tokens` tokens, from those that began later if need be; false if there are none
    /// and `id`, as the last that began, was sent back itself.
    fn make_room(&mut self, id: SequenceId, tokens: usize) -> bool {
        while !self.grow(id, tokens) {
            let Some(last) = self.running.last().copied() else {
                return false;
            };
            self.send_back(last);
            if last == id {
                return false;
            }
        }
        true
    }

    /// Gets blocks for the next `tokens` tokens; false, with what it got, if there are too few.
    fn grow(&mut self, id: SequenceId, tokens: usize) -> bool {
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return false;
        };
        while sequence.blocks.len() * BLOCK_TOKENS < sequence.computed + tokens {
            match self.blocks.allocate() {
                Some(block) => sequence.blocks.push(block),
                None => return false,
            }
        }
        true
    }

    /// A running sequence becomes the first that waits in its group.
    fn send_back(&mut self, id: SequenceId) {
        self.running.retain(|other| *other != id);
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return;
        };
        sequence.computed = 0;
        let blocks = std::mem::take(&mut sequence.blocks);
        if let Some(group) = self.groups.get_mut(&sequence.group) {
            group.waiting.push_front(id);
            group.running -= 1;
        }
        blocks.iter().rev().for_each(|block| self.blocks.release(*block));
    }

    fn plan_prompts(&mut self, plan: &mut Plan) {
        let groups = self.groups_with_prompts();
        let given = self.fill_with_prompts(plan);
        self.clock += given as u64 * UNIT / groups.max(1);
    }

    fn groups_with_prompts(&self) -> u64 {
        let mut groups: Vec<u64> = self
            .running
            .iter()
            .filter(|id| self.left(**id) > 1)
            .map(|id| self.sequences[id].group)
            .collect();
        groups.sort_unstable();
        groups.dedup();
        let waiting = self
            .groups
            .iter()
            .filter(|(id, group)| !group.waiting.is_empty() && groups.binary_search(id).is_err());
        (groups.len() + waiting.count()) as u64
    }

    /// Tokens of prompts that run.
    fn fill_with_prompts(&mut self, plan: &mut Plan) -> usize {
        let mut room = self
            .limits
            .max_batch_tokens
            .saturating_sub(plan.shares.len())
            .max(1);
        let mut given = 0;
        let mut turns = Turns {
            passed: plan.shares.iter().map(|share| share.sequence).collect(),
            may_begin: true,
            idle: BTreeSet::new(),
        };
        while room > 0 {
            let Some(id) = self.next_prompt(plan, &mut turns) else {
                break;
            };
            turns.passed.insert(id);
            if !self.running.contains(&id) && !self.start(id, plan) {
                // What comes free is for the one whose turn it was: others that need less would take it for ever.
                turns.may_begin = false;
                continue;
            }
            let tokens = self.left(id).min(room);
            let oldest = self.running.first() == Some(&id);
            let fits = match oldest {
                true => self.make_room(id, tokens),
                false => self.grow(id, tokens),
            };
            let sequence = &self.sequences[&id];
            let from = sequence.computed;
            let to = match fits {
                true => from + tokens,
                false => (sequence.blocks.len() * BLOCK_TOKENS).clamp(from, from + tokens),
            };
            if oldest {
                // Whoever was sent back for it does not run.
                let running = &self.running;
                plan.shares.retain(|share| running.contains(&share.sequence));
            }
            if from == to {
                continue;
            }
            if let Some(group) = self.groups.get_mut(&self.sequences[&id].group) {
                group.served += (to - from) as u64 * UNIT;
                group.begun = true;
            }
            plan.shares.push(Share {
                sequence: id,
                range: from..to,
            });
            room -= to - from;
            given += to - from;
        }
        given
    }

    /// The prompt whose turn it is: one that has begun and needs no more than a step; else of the group that was served
    /// least, one that has begun, or else the first that waits and has no reason to.
    fn next_prompt(&self, plan: &Plan, turns: &mut Turns) -> Option<SequenceId> {
        let free = |id: &SequenceId| !turns.passed.contains(id) && self.left(*id) > 0;
        let begun: Vec<SequenceId> = self.running.iter().copied().filter(free).collect();
        let almost_through = begun
            .iter()
            .find(|id| self.left(**id) <= self.limits.max_batch_tokens);
        if almost_through.is_some() {
            return almost_through.copied();
        }
        // The first of each group.
        let mut next: BTreeMap<u64, SequenceId> = BTreeMap::new();
        for id in begun {
            next.entry(self.sequences[&id].group).or_insert(id);
        }
        if turns.may_begin && self.running.len() < self.limits.max_running {
            let most = self.most_of_a_group();
            for (id, group) in &self.groups {
                if group.running >= most || next.contains_key(id) || turns.idle.contains(id) {
                    continue;
                }
                match self.first_waiting(group, plan, turns) {
                    Some(first) => drop(next.insert(*id, first)),
                    None => drop(turns.idle.insert(*id)),
                }
            }
        }
        // Among equals one that was given nothing yet, then the oldest.
        let turn = |(id, _): &(u64, SequenceId)| {
            let group = &self.groups[id];
            (group.served, group.begun, *id)
        };
        next.into_iter().min_by_key(turn).map(|(_, id)| id)
    }

    /// The first that waits in a group and has no reason to; who has one waits for the whole step.
    fn first_waiting(&self, group: &Group, plan: &Plan, turns: &mut Turns) -> Option<SequenceId> {
        for id in &group.waiting {
            if turns.passed.contains(id) {
                continue;
            }
            if !self.follows(*id, plan) {
                return Some(*id);
            }
            turns.passed.insert(*id);
        }
        None
    }

    /// One group leaves some places to others, or a large batch of long answers would shut a short question out.
    fn most_of_a_group(&self) -> usize {
        self.limits.max_running - self.limits.max_running / 4
    }

    /// Whether a waiting sequence begins as one does that is being run in this step, and would have more of it later.
    fn follows(&self, id: SequenceId, plan: &Plan) -> bool {
        let sequence = &self.sequences[&id];
        let mut there = None;
        plan.shares.iter().any(|share| {
            let other = &self.sequences[&share.sequence];
            let fits = match (sequence.scores, other.scores) {
                (None, _) => true,
                (Some(own), Some(theirs)) => theirs.from <= own.from && theirs.top >= own.top,
                (Some(_), None) => false,
            };
            if !fits || share.range.len() < WORTH_WAITING {
                return false;
            }
            let run = &other.tokens[..share.range.end];
            let common = run
                .iter()
                .zip(&sequence.tokens)
                .take_while(|(a, b)| a == b)
                .count();
            let there =
                *there.get_or_insert_with(|| self.blocks.find(&sequence.tokens, sequence.scores).tokens());
            common >= there + WORTH_WAITING
        })
    }

    /// Lets a waiting sequence run with what is there of it, if there are blocks for all of its tokens.
    fn start(&mut self, id: SequenceId, plan: &mut Plan) -> bool {
        let sequence = &self.sequences[&id];
        let (length, scores) = (sequence.tokens.len(), sequence.scores);
        let mut found = self.blocks.find(&sequence.tokens, scores);
        let there = found.tokens();
        // The row of the last token gives the next one; the row of the last that was found gives the score of the token
        // behind it.
        let scored_next = scores.is_some_and(|scores| there >= scores.from);
        let computed = if scored_next || there == length {
            there.saturating_sub(1)
        } else {
            there
        };
        let mut sources = found.full.clone();
        sources.extend(found.part.map(|(block, _)| block));
        let shared = computed / BLOCK_TOKENS;
        let part = computed % BLOCK_TOKENS;
        found.full.truncate(shared);
        let idle = found
            .full
            .iter()
            .filter(|block| self.blocks.is_idle(**block))
            .count();
        let promised: usize = self.running.iter().map(|other| self.missing(*other)).sum();
        let needed = length.div_ceil(BLOCK_TOKENS) - shared + promised + idle;
        if self.blocks.available() < needed && !self.running.is_empty() {
            return false;
        }
        found.full.iter().for_each(|block| self.blocks.take(*block));
        let mut table = found.full;
        let mut computed = shared * BLOCK_TOKENS;
        if part > 0 {
            let source = sources[shared];
            // Held while room is made, or it might be what goes.
            self.blocks.take(source);
            let copy = self.blocks.allocate();
            self.blocks.release(source);
            if let Some(to) = copy {
                plan.copies.push(Copy {
                    from: source,
                    to,
                    tokens: part,
                });
                table.push(to);
                computed += part;
            }
        }
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return false;
        };
        (sequence.blocks, sequence.computed) = (table, computed);
        if let Some(group) = self.groups.get_mut(&sequence.group) {
            group.waiting.retain(|other| *other != id);
            group.running += 1;
        }
        self.running.push(id);
        if part > 0 && computed % BLOCK_TOKENS == part {
            let tokens = self.sequences[&id].tokens[shared * BLOCK_TOKENS..computed].to_vec();
            let parent = shared.checked_sub(1).map(|at| self.sequences[&id].blocks[at]);
            let block = self.sequences[&id].blocks[shared];
            self.blocks.extend(block, parent, &tokens, 0..0, 0);
        }
        plan.starts.push(Start {
            sequence: id,
            blocks: sources,
            found: there.min(length),
        });
        true
    }

    /// Blocks that a running sequence needs for the tokens it has.
    fn missing(&self, id: SequenceId) -> usize {
        self.sequences.get(&id).map_or(0, |s| {
            s.tokens
                .len()
                .div_ceil(BLOCK_TOKENS)
                .saturating_sub(s.blocks.len())
        })
    }

    /// A share was run. `scored`: positions of the sequence of which scores are known now.
    pub fn ran(&mut self, share: &Share, scored: Range<usize>) -> Vec<Filled> {
        let Some(sequence) = self.sequences.get_mut(&share.sequence) else {
            return Vec::new();
        };
        let top = sequence.scores.map_or(0, |scores| scores.top);
        sequence.computed = share.range.end;
        let mut filled = Vec::new();
        for index in share.range.start / BLOCK_TOKENS..share.range.end.div_ceil(BLOCK_TOKENS) {
            let start = index * BLOCK_TOKENS;
            let tokens = share.range.start.max(start)..share.range.end.min(start + BLOCK_TOKENS);
            let known = scored.start.clamp(start, tokens.end)..scored.end.clamp(start, tokens.end);
            let parent = index.checked_sub(1).map(|before| sequence.blocks[before]);
            let same = self.blocks.extend(
                sequence.blocks[index],
                parent,
                &sequence.tokens[tokens],
                known.start - start..known.end - start,
                top,
            );
            let keep_scores = same.as_ref().is_none_or(|same| same.take_scores);
            if let Some(same) = same {
                sequence.blocks[index] = same.block;
            }
            filled.push(Filled {
                block: sequence.blocks[index],
                scored: known,
                keep_scores,
            });
        }
        filled
    }

    #[cfg(test)]
    fn check(&self) {
        let tables: Vec<&[Block]> = self.sequences.values().map(|s| &s.blocks[..]).collect();
        self.blocks.check(&tables);
        for (id, group) in &self.groups {
            let running = self
                .running
                .iter()
                .filter(|other| self.sequences[*other].group == *id);
            assert_eq!(running.count(), group.running);
            assert_eq!(group.sequences, group.running + group.waiting.len());
        }
        for (id, sequence) in &self.sequences {
            let runs = self.running.contains(id);
            let waits = self.groups[&sequence.group].waiting.contains(id);
            assert!(runs != waits, "{id} is in one place");
            assert!(sequence.computed <= sequence.blocks.len() * BLOCK_TOKENS);
            assert!(runs || sequence.blocks.is_empty());
        }
        assert!(self.running.len() <= self.limits.max_running);
    }
}
