//! Which block holds which tokens: a prefix tree over blocks, with the blocks that no sequence uses kept as a cache
//! until their room is needed. Pure bookkeeping; the numbers lie in [`crate::KvPool`].
//!
//! A node of the tree is a block; its path from the root is the whole text before it, so that equal paths mean equal
//! keys and values. Only its one writer changes a block, and only until it is full: full blocks are shared as they
//! are, the beginning of any block may be copied.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use crate::kv::BLOCK_TOKENS;

pub(crate) type Block = u32;

/// All blocks of one pool.
#[derive(Debug)]
pub(crate) struct Blocks {
    nodes: Vec<Node>,
    /// Blocks that hold nothing.
    free: Vec<Block>,
    /// Listed blocks by parent and first token.
    children: HashMap<(Option<Block>, u32), Vec<Block>>,
    /// Listed blocks that nobody uses and that have no children, by when they were used last.
    leaves: BTreeMap<u64, Block>,
    /// Listed blocks that nobody uses.
    cached: usize,
    clock: u64,
}

#[derive(Debug, Default)]
struct Node {
    tokens: Vec<u32>,
    /// Tokens of the block whose scores are kept, and with how many likeliest tokens.
    scored: Range<usize>,
    top: usize,
    users: usize,
    /// Set once it has tokens: its place in the tree.
    listed: Option<Listed>,
}

#[derive(Debug)]
struct Listed {
    parent: Option<Block>,
    children: usize,
    used: u64,
}

/// What of a text is there already.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Found {
    /// Full blocks from the beginning on.
    pub full: Vec<Block>,
    /// A block that begins with the next tokens, and how many.
    pub part: Option<(Block, usize)>,
}

impl Found {
    pub fn tokens(&self) -> usize {
        self.full.len() * BLOCK_TOKENS + self.part.map_or(0, |(_, tokens)| tokens)
    }
}

/// Scores that a text needs: for its tokens from `from` on, with `top` likeliest tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Scores {
    pub from: usize,
    pub top: usize,
}

/// A block that turned out to hold what another one holds.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Same {
    /// Takes the block's place.
    pub block: Block,
    /// The scores of the block that goes are the better ones.
    pub take_scores: bool,
}

impl Blocks {
    pub fn new(count: usize) -> Self {
        let count = count.min(Block::MAX as usize);
        Self {
            nodes: (0..count).map(|_| Node::default()).collect(),
            free: (0..count as Block).rev().collect(),
            children: HashMap::new(),
            leaves: BTreeMap::new(),
            cached: 0,
            clock: 0,
        }
    }

    pub fn count(&self) -> usize {
        self.nodes.len()
    }

    /// Blocks that can be had now.
    pub fn available(&self) -> usize {
        self.free.len() + self.cached
    }

    /// Blocks that sequences use.
    pub fn used(&self) -> usize {
        self.count() - self.available()
    }

    /// The longest beginning of `tokens` that is there, with the scores that are needed.
    pub fn find(&self, tokens: &[u32], scores: Option<Scores>) -> Found {
        let mut found = Found::default();
        while let Some(first) = tokens.get(found.full.len() * BLOCK_TOKENS) {
            let at = found.full.len() * BLOCK_TOKENS;
            let parent = found.full.last().copied();
            let listed = self
                .children
                .get(&(parent, *first))
                .map_or(&[][..], Vec::as_slice);
            let common = |block: &Block| self.common(*block, at, &tokens[at..], scores);
            let best = listed
                .iter()
                .map(|block| (common(block), *block))
                .max_by_key(|(common, _)| *common);
            match best {
                Some((BLOCK_TOKENS, block)) => found.full.push(block),
                Some((common @ 1.., block)) => {
                    found.part = Some((block, common));
                    break;
                }
                _ => break,
            }
        }
        found
    }

    /// Tokens of a block, which begins at position `at`, that `tokens` begin with and that have the scores they need.
    fn common(&self, block: Block, at: usize, tokens: &[u32], scores: Option<Scores>) -> usize {
        let node = &self.nodes[block as usize];
        let common = node.tokens.iter().zip(tokens).take_while(|(a, b)| a == b).count();
        let Some(Scores { from, top }) = scores.filter(|scores| scores.from < at + common) else {
            return common;
        };
        let needed = from.saturating_sub(at);
        match node.top >= top && node.scored.start <= needed {
            true => common.min(node.scored.end.max(needed)),
            false => needed,
        }
    }

    /// Whether nobody uses a block yet: to take it makes one less available.
    pub fn is_idle(&self, block: Block) -> bool {
        self.nodes[block as usize].users == 0
    }

    /// Uses a block that was found.
    pub fn take(&mut self, block: Block) {
        let node = &mut self.nodes[block as usize];
        node.users += 1;
        if node.users == 1 {
            self.cached -= 1;
            if let Some(listed) = &node.listed {
                self.leaves.remove(&listed.used);
            }
        }
    }

    /// A block with nothing in it, for one writer; what was used least recently makes room.
    pub fn allocate(&mut self) -> Option<Block> {
        let block = match self.free.pop() {
            Some(block) => block,
            None => {
                let (_, block) = self.leaves.pop_first()?;
                self.evict(block);
                block
            }
        };
        self.nodes[block as usize].users = 1;
        Some(block)
    }

    fn evict(&mut self, block: Block) {
        let node = std::mem::take(&mut self.nodes[block as usize]);
        self.cached -= 1;
        let Some(listed) = node.listed else { return };
        if let Some(first) = node.tokens.first() {
            self.unlist(listed.parent, *first, block);
        }
        if let Some(parent) = listed.parent {
            let parent_node = &mut self.nodes[parent as usize];
            if let Some(above) = &mut parent_node.listed {
                above.children -= 1;
                if above.children == 0 && parent_node.users == 0 {
                    self.leaves.insert(above.used, parent);
                }
            }
        }
    }

    fn unlist(&mut self, parent: Option<Block>, first: u32, block: Block) {
        let key = (parent, first);
        if let Some(siblings) = self.children.get_mut(&key) {
            siblings.retain(|other| *other != block);
            if siblings.is_empty() {
                self.children.remove(&key);
            }
        }
    }

    /// Gives a block back; what it holds stays findable while its room is not needed.
    pub fn release(&mut self, block: Block) {
        self.clock += 1;
        let node = &mut self.nodes[block as usize];
        node.users -= 1;
        if node.users > 0 {
            return;
        }
        match &mut node.listed {
            None => {
                *node = Node::default();
                self.free.push(block);
            }
            Some(listed) => {
                self.cached += 1;
                listed.used = self.clock;
                if listed.children == 0 {
                    self.leaves.insert(self.clock, block);
                }
            }
        }
    }

    /// The writer of a block has put `tokens` behind what is in it. `scored` and `top` say of which of all its tokens
    /// scores are kept. Once it is full, a block of the same text may take its place.
    pub fn extend(
        &mut self,
        block: Block,
        parent: Option<Block>,
        tokens: &[u32],
        scored: Range<usize>,
        top: usize,
    ) -> Option<Same> {
        self.clock += 1;
        let used = self.clock;
        let node = &mut self.nodes[block as usize];
        node.tokens.extend_from_slice(tokens);
        (node.scored, node.top) = (scored, top);
        let first = *node.tokens.first()?;
        let full = node.tokens.len() == BLOCK_TOKENS;
        let siblings = self.children.entry((parent, first)).or_default();
        let node = &self.nodes[block as usize];
        let same = siblings.iter().copied().find(|other| {
            let other = *other as usize;
            full && other != block as usize && self.nodes[other].tokens == node.tokens
        });
        if let Some(same) = same {
            let other = &self.nodes[same as usize];
            let take_scores = match node.scored.len().cmp(&other.scored.len()) {
                std::cmp::Ordering::Equal => node.top > other.top,
                more => more.is_gt(),
            };
            if take_scores {
                let (scored, top) = (node.scored.clone(), node.top);
                let other = &mut self.nodes[same as usize];
                (other.scored, other.top) = (scored, top);
            }
            self.replace(block, same);
            return Some(Same {
                block: same,
                take_scores,
            });
        }
        if node.listed.is_none() {
            siblings.push(block);
            self.nodes[block as usize].listed = Some(Listed {
                parent,
                children: 0,
                used,
            });
            let above = parent.and_then(|parent| self.nodes[parent as usize].listed.as_mut());
            if let Some(above) = above {
                above.children += 1;
            }
        }
        None
    }

    /// The writer of `block` goes on with `same`; nobody else can have `block`, which was not full.
    fn replace(&mut self, block: Block, same: Block) {
        self.take(same);
        let node = std::mem::take(&mut self.nodes[block as usize]);
        self.free.push(block);
        let Some(listed) = node.listed else { return };
        if let Some(first) = node.tokens.first() {
            self.unlist(listed.parent, *first, block);
        }
        let above = listed
            .parent
            .and_then(|parent| self.nodes[parent as usize].listed.as_mut());
        if let Some(above) = above {
            above.children -= 1;
        }
    }

    /// Forgets everything that nobody uses.
    #[cfg(test)]
    pub fn clear(&mut self) {
        while let Some((_, block)) = self.leaves.pop_first() {
            self.evict(block);
            self.free.push(block);
        }
    }

    /// What must hold at any time; `tables` are the blocks that each sequence uses.
    #[cfg(test)]
    pub fn check(&self, tables: &[&[Block]]) {
        let mut users = vec![0; self.count()];
        tables
            .iter()
            .flat_map(|table| table.iter())
            .for_each(|b| users[*b as usize] += 1);
        let mut children = vec![0; self.count()];
        let (mut free, mut cached, mut leaves) = (0, 0, 0);
        for (block, node) in self.nodes.iter().enumerate() {
            assert_eq!(node.users, users[block], "users of block {block}");
            assert_eq!(node.listed.is_some(), !node.tokens.is_empty());
            assert!(node.tokens.len() <= BLOCK_TOKENS && node.scored.end <= BLOCK_TOKENS);
            match &node.listed {
                Some(listed) => {
                    if let Some(parent) = listed.parent {
                        children[parent as usize] += 1;
                        assert_eq!(self.nodes[parent as usize].tokens.len(), BLOCK_TOKENS);
                        assert!(self.nodes[parent as usize].listed.is_some());
                        assert!(
                            users[block] <= users[parent as usize],
                            "a parent is used with its child"
                        );
                    }
                    let key = (listed.parent, node.tokens[0]);
                    assert!(self.children[&key].contains(&(block as Block)));
                    cached += usize::from(node.users == 0);
                    leaves += usize::from(node.users == 0 && listed.children == 0);
                    if node.users == 0 && listed.children == 0 {
                        assert_eq!(self.leaves.get(&listed.used), Some(&(block as Block)));
                    }
                }
                None => free += usize::from(node.users == 0),
            }
        }
        for (node, children) in self.nodes.iter().zip(children) {
            assert_eq!(node.listed.as_ref().map_or(0, |l| l.children), children);
        }
        assert_eq!(
            (free, cached, leaves),
            (self.free.len(), self.cached, self.leaves.len())
        );
        let listed: usize = self.children.values().map(Vec::len).sum();
        assert_eq!(listed, self.nodes.iter().filter(|n| n.listed.is_some()).count());
    }
}
