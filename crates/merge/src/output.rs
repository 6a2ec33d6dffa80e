//! A merge from start to end: digest of a recipe over its parents' content, and the folder of the result.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use cauldron_checkpoint::{
    CheckpointError, Digest, FileEntry, SIDECAR_FILES, ShardPlan, ShardedWriter, pretty, write_small,
};
use serde_json::{Map, Value};

use crate::card;
use crate::family::{Family, passes};
use crate::journal::{FinishedShard, Journal, merge_key};
use crate::layout::{OutTensor, Role};
use crate::manifest::{MANIFEST_FILE, MANIFEST_FORMAT, Manifest, ParentEntry, Summary, TensorStats};
use crate::parents::{PARSED_SIDECARS, read_sidecar};
use crate::point::{ChunkStats, Point};
use crate::recipe::{Recipe, dtype_name};
use crate::stream::{Chunk, WINDOW};
use crate::{MergeError, Parents};

/// Version of the arithmetic. It is part of every digest: change it when any bit of any result changes.
pub const ARITHMETIC_VERSION: u32 = 3;
/// Config entries that could run foreign code or name a local path.
const DROPPED_CONFIG: &[&str] = &["auto_map", "_attn_implementation_internal", "_name_or_path"];

/// Files that say the same as tokenizer.json does, of one model's vocabulary.
const OF_ONE_VOCABULARY: &[&str] = &["added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model"];

/// Hears of progress and says when to stop.
pub trait Observer: Sync {
    /// `bytes` more of the parents have been read and dealt with.
    fn advance(&self, bytes: u64);
    fn cancelled(&self) -> bool;

    /// A step is done after which a crash would leave something else: `merge-first-shard`, `merge-weights-written` or
    /// `merge-manifest-written`. For tests of crashes.
    fn reached(&self, _step: &'static str) {}
}

/// Choices about the files that change no tensor.
#[derive(Debug, Clone, Copy)]
pub struct MergeOptions {
    /// A shard is closed before it would pass this size in bytes.
    pub max_shard_bytes: u64,
    /// Elements of the result that are computed together: what is held in memory grows with it (docs/METHODS.md).
    pub window_elements: usize,
}

impl Default for MergeOptions {
    fn default() -> Self {
        Self {
            max_shard_bytes: 5_000_000_000,
            window_elements: WINDOW,
        }
    }
}

/// Digest of all that decides the result's tensors: the recipe with each reference replaced by the digest of its content,
/// and the arithmetic version. Reads of the parents what nothing has read yet, so it costs least after a merge.
pub fn merge_digest(recipe: &Recipe, parents: &Parents, obs: &dyn Observer) -> Result<Digest, MergeError> {
    let contents = parents.contents(obs)?;
    let canonical = recipe.canonical_with(&|reference| {
        let found = contents.iter().find(|(known, _)| known == reference);
        found.map_or_else(String::new, |(_, digest)| digest.to_string())
    });
    let mut hasher = blake3::Hasher::new_derive_key("cauldron merge result v1");
    hasher.update(&ARITHMETIC_VERSION.to_le_bytes());
    hasher.update(canonical.as_bytes());
    Ok(hasher.finalize().into())
}

/// Merges into `out`, an existing folder: weights, config, tokenizer, model card, manifest, all synced. The folder is empty,
/// or has what a merge with the same [`merge_key`](crate::merge_key) left when it was cut short: finished shards are checked
/// and used again. Moving the folder to its place is the caller's business.
pub fn merge_to_folder(
    recipe: &Recipe,
    parents: &Parents,
    out: &Path,
    options: &MergeOptions,
    obs: &dyn Observer,
) -> Result<Manifest, MergeError> {
    merge_with(&mut OnCpu, recipe, parents, out, options, obs)
}

/// As [`merge_to_folder`], with the arithmetic on a GPU; the same bytes. What its kernels do not compute, or all that is left
/// when it fails, is computed on the CPU.
#[cfg(feature = "gpu")]
pub fn merge_to_folder_on_gpu(
    streamed: &mut crate::Streamed<'_>,
    recipe: &Recipe,
    parents: &Parents,
    out: &Path,
    options: &MergeOptions,
    obs: &dyn Observer,
) -> Result<Manifest, MergeError> {
    match crate::Streamed::computes(recipe) {
        true => merge_with(streamed, recipe, parents, out, options, obs),
        false => merge_to_folder(recipe, parents, out, options, obs),
    }
}

/// Takes the windows of a point's tensors, in order.
pub(crate) type Consume<'a> = dyn FnMut(&[Chunk], Vec<ChunkStats>, Vec<u8>) -> Result<(), MergeError> + 'a;

/// Where a merge is computed.
pub(crate) trait MergesWindows {
    /// Whether a run of tensors ends with waiting for what is still on its way.
    fn waits_at_the_end(&self) -> bool {
        false
    }

    /// What is to be called now and then while tensors are prepared.
    fn meanwhile(&self) -> Option<Arc<dyn Fn() + Send + Sync>> {
        None
    }

    /// Nothing more is to be merged.
    fn done(&mut self) {}

    /// Merges some tensors and hands over whole windows, in buffers that `spare` gives.
    fn write_each(
        &mut self,
        point: &Point<'_, '_>,
        which: &[usize],
        obs: &dyn Observer,
        spare: &mut dyn FnMut() -> Vec<u8>,
        consume: &mut Consume<'_>,
    ) -> Result<(), MergeError>;
}

struct OnCpu;

impl MergesWindows for OnCpu {
    fn write_each(
        &mut self,
        point: &Point<'_, '_>,
        which: &[usize],
        obs: &dyn Observer,
        spare: &mut dyn FnMut() -> Vec<u8>,
        consume: &mut Consume<'_>,
    ) -> Result<(), MergeError> {
        point.stream(|stream| {
            stream.write_each(
                which,
                obs,
                spare,
                |work, scratch, chunk, bytes| point.merge(work, scratch, chunk, bytes),
                consume,
            )
        })
    }
}

fn merge_with(
    engine: &mut dyn MergesWindows,
    recipe: &Recipe,
    parents: &Parents,
    out: &Path,
    options: &MergeOptions,
    obs: &dyn Observer,
) -> Result<Manifest, MergeError> {
    let (mut journal, finished) = Journal::open(out, &merge_key(recipe, parents, options)?, obs)?;
    let family = Family::open(recipe, parents, options.window_elements, obs)?;
    let mut warnings = parents.warnings().to_vec();
    warnings.extend(family.unrelated(obs)?);
    let shards = ShardPlan::new(parents.layout.plans(), options.max_shard_bytes);
    let (mut files, tensors) = write_weights(engine, family, &shards, out, &mut journal, finished, obs)?;
    obs.reached("merge-weights-written");
    files.extend(write_sidecars(recipe, parents, out).map_err(MergeError::output)?);

    let digest = merge_digest(recipe, parents, obs)?;
    parents.check_unchanged()?;
    let contents = parents.contents(obs)?;
    let summary = summarise(&tensors, &shards);
    let mut manifest = Manifest {
        format: MANIFEST_FORMAT,
        arithmetic: ARITHMETIC_VERSION,
        cauldron: env!("CARGO_PKG_VERSION").to_owned(),
        digest,
        recipe: recipe_without_name(recipe),
        lambda: recipe.lambda(),
        parents: recipe
            .references()
            .zip(contents)
            .map(|((role, reference), (_, content))| ParentEntry {
                role,
                reference: reference.to_string(),
                content: *content,
            })
            .collect(),
        warnings,
        files,
        summary,
        tensors,
    };
    let card = card::render(&manifest);
    let entry = write_small(out, "README.md", card.as_bytes()).map_err(MergeError::output)?;
    manifest.files.push(entry);
    manifest.files.sort_by(|a, b| a.name.cmp(&b.name));
    pretty(MANIFEST_FILE, &manifest)
        .and_then(|bytes| write_small(out, MANIFEST_FILE, &bytes))
        .map_err(MergeError::output)?;
    obs.reached("merge-manifest-written");
    // Until then another try finds the shards.
    journal.remove().map_err(MergeError::output)?;
    sync_folder(out).map_err(MergeError::output)?;
    Ok(manifest)
}

/// The name it is served under is no part of what it is.
pub(crate) fn recipe_without_name(recipe: &Recipe) -> Value {
    let mut json = recipe.to_json();
    if let Value::Object(entries) = &mut json {
        entries.shift_remove("serve_as");
    }
    json
}

fn metadata(recipe: &Recipe) -> BTreeMap<String, String> {
    BTreeMap::from([
        ("format".to_owned(), "pt".to_owned()),
        ("cauldron.arithmetic".to_owned(), ARITHMETIC_VERSION.to_string()),
        (
            "cauldron.recipe".to_owned(),
            recipe_without_name(recipe).to_string(),
        ),
    ])
}

/// Computes on all threads and writes on one more, so that hashing and the disk do not wait for arithmetic.
fn write_weights(
    engine: &mut dyn MergesWindows,
    mut family: Family<'_>,
    shards: &ShardPlan,
    out: &Path,
    journal: &mut Journal,
    finished: Vec<FinishedShard>,
    obs: &dyn Observer,
) -> Result<(Vec<FileEntry>, Vec<TensorStats>), MergeError> {
    let tensors = family.tensors();
    let stats = Mutex::new(vec![ChunkStats::default(); tensors.len()]);
    let models = family.recipe.models.len();
    let stats_of = |which: Range<usize>| -> Vec<TensorStats> {
        let mut stats = stats.lock().unwrap_or_else(PoisonError::into_inner);
        let totals = stats[which.clone()].iter_mut().map(std::mem::take);
        let tensors = tensors[which].iter().zip(totals);
        tensors
            .map(|(tensor, total)| tensor_stats(tensor, models, total))
            .collect()
    };
    let first = shards.shard(finished.len()).start;
    skip(&family, first, obs);
    let (files, mut known): (Vec<_>, Vec<_>) = finished.into_iter().map(|s| (s.file, s.tensors)).unzip();
    let mut writer = ShardedWriter::new(out, shards.clone(), metadata(family.recipe)).after(files);
    let whole = AtomicBool::new(false);
    let (sender, windows) = sync_channel::<Vec<u8>>(2);
    let (written, spare) = channel::<Vec<u8>>();
    let (files, rest) = std::thread::scope(|scope| {
        let writing = scope.spawn(|| {
            let mut rest = Vec::new();
            for bytes in windows {
                writer.write(&bytes)?;
                // Nobody waits for a buffer any more after the last window.
                let _ = written.send(bytes);
                for (shard, file) in writer
                    .finished()
                    .iter()
                    .enumerate()
                    .skip(known.len() + rest.len())
                {
                    let shard = FinishedShard {
                        file: file.clone(),
                        tensors: stats_of(shards.shard(shard)),
                    };
                    journal.note(&shard)?;
                    obs.reached("merge-first-shard");
                    rest.push(shard.tensors);
                }
            }
            // Of a failed merge nothing is left to be written.
            match whole.load(Ordering::Acquire) {
                true => Ok(Some((writer.finish()?, rest))),
                false => Ok(None),
            }
        });
        let consume = &mut |chunks: &[Chunk], parts: Vec<ChunkStats>, bytes: Vec<u8>| {
            let mut stats = stats.lock().unwrap_or_else(PoisonError::into_inner);
            chunks
                .iter()
                .zip(parts)
                .for_each(|(chunk, part)| add(&mut stats[chunk.tensor], part));
            drop(stats);
            // The writer hangs up only when it failed; its own error is reported below.
            sender.send(bytes).map_err(|_| MergeError::Cancelled)
        };
        let merged = merge_windows(engine, &mut family, first, obs, spare, consume);
        whole.store(merged.is_ok(), Ordering::Release);
        drop(sender);
        let written = writing.join().map_err(|_| MergeError::Internal {
            detail: "the writer panicked".into(),
        })?;
        match (merged, written) {
            (_, Err(e)) => Err(MergeError::output(e)),
            (Err(e), _) => Err(e),
            (Ok(()), Ok(Some(written))) => Ok(written),
            (Ok(()), Ok(None)) => Err(MergeError::Internal {
                detail: "the writer stopped early".into(),
            }),
        }
    })?;
    known.extend(rest);
    let mut tensors: Vec<TensorStats> = known.into_iter().flatten().collect();
    // Shards of empty tensors only are written last.
    tensors.extend(stats_of(tensors.len()..shards.tensors().len()));
    Ok((files, tensors))
}

/// Merges the tensors from `first` on and hands over whole windows, in order; with a buffer from `spare` if there is one.
fn merge_windows(
    engine: &mut dyn MergesWindows,
    family: &mut Family<'_>,
    first: usize,
    obs: &dyn Observer,
    spare: Receiver<Vec<u8>>,
    consume: &mut Consume<'_>,
) -> Result<(), MergeError> {
    let preparing = Preparing {
        obs,
        meanwhile: engine.meanwhile(),
    };
    if family.is_global() {
        family.prepare_tensors(0..family.tensors().len(), &preparing)?;
    }
    let groups = family.groups(first, engine.waits_at_the_end());
    for (index, group) in groups.iter().cloned().enumerate() {
        if !family.is_global() {
            // Read by the kernel while this group is prepared and merged.
            if let Some(next) = groups.get(index + 1) {
                family.prefetch(next.clone());
            }
            family.prepare_tensors(group.clone(), &preparing)?;
        }
        let point = family.point_of(None, group.clone())?;
        let which: Vec<usize> = group.clone().collect();
        let mut spare = || spare.try_recv().unwrap_or_default();
        engine.write_each(&point, &which, obs, &mut spare, consume)?;
        family.forget(group);
    }
    engine.done();
    Ok(())
}

/// Hears of what is prepared.
struct Preparing<'a> {
    obs: &'a dyn Observer,
    meanwhile: Option<Arc<dyn Fn() + Send + Sync>>,
}

impl Observer for Preparing<'_> {
    fn advance(&self, bytes: u64) {
        self.obs.advance(bytes);
    }

    fn cancelled(&self) -> bool {
        if let Some(meanwhile) = &self.meanwhile {
            meanwhile();
        }
        self.obs.cancelled()
    }
}

/// Counts the passes over tensors that an earlier try has merged as done.
fn skip(family: &Family<'_>, first: usize, obs: &dyn Observer) {
    let skipped: Vec<usize> = (0..first).collect();
    let all = passes(family.recipe);
    for _ in 0..if family.is_global() { 1 } else { all } {
        family.advance(&skipped, obs);
    }
}

fn add(total: &mut ChunkStats, part: ChunkStats) {
    fn sum<T: Copy + Default + std::ops::AddAssign>(total: &mut Vec<T>, part: &[T]) {
        total.resize(total.len().max(part.len()), T::default());
        total.iter_mut().zip(part).for_each(|(t, p)| *t += *p);
    }
    sum(&mut total.kept, &part.kept);
    sum(&mut total.delta_squares, &part.delta_squares);
    total.observed += part.observed;
    total.conflicting += part.conflicting;
    total.base_squares += part.base_squares;
    total.product += part.product;
}

/// Statistics of the members become lists over all models; one that takes no part has zeros. What was seen of a part of the
/// tensor stands for the rest of it.
fn tensor_stats(tensor: &OutTensor, models: usize, total: ChunkStats) -> TensorStats {
    let observed = total.observed.max(1) as f64;
    let share = |count: u64| count as f64 / observed;
    let whole = tensor.plan.numel() as f64 / observed;
    let by_model = |values: Vec<f64>| match values.is_empty() {
        true => Vec::new(),
        false => {
            let mut all = vec![0.0; models];
            tensor
                .members
                .iter()
                .zip(values)
                .for_each(|((model, _), value)| all[*model] = value);
            all
        }
    };
    TensorStats {
        name: tensor.plan.name.clone(),
        role: match tensor.role {
            Role::Merge => "merged",
            Role::Excluded => "excluded",
            Role::Copied => "copied",
        }
        .to_owned(),
        kept: by_model(total.kept.iter().map(|k| share(*k)).collect()),
        conflicting: share(total.conflicting),
        delta_norm: by_model(total.delta_squares.iter().map(|s| (s * whole).sqrt()).collect()),
        base_norm: (total.base_squares * whole).sqrt(),
        delta_product: total.product * whole,
    }
}

fn summarise(tensors: &[TensorStats], shards: &ShardPlan) -> Summary {
    let parameters = shards.tensors().iter().map(|t| t.numel() as u64).sum();
    let merged: Vec<(&TensorStats, f64)> = tensors
        .iter()
        .zip(shards.tensors())
        .filter(|(stats, _)| stats.role == "merged")
        .map(|(stats, plan)| (stats, plan.numel() as f64))
        .collect();
    let elements: f64 = merged.iter().map(|(_, n)| n).sum::<f64>().max(1.0);
    let parents = merged.iter().map(|(s, _)| s.kept.len()).max().unwrap_or(0);
    let at = |values: &Vec<f64>, k: usize| values.get(k).copied().unwrap_or(0.0);
    let base: f64 = merged.iter().map(|(s, _)| s.base_norm.powi(2)).sum();
    let relative = |k: usize| {
        let delta: f64 = merged.iter().map(|(s, _)| at(&s.delta_norm, k).powi(2)).sum();
        match base > 0.0 {
            true => (delta / base).sqrt(),
            false => 0.0,
        }
    };
    Summary {
        parameters,
        kept: (0..parents)
            .map(|k| merged.iter().map(|(s, n)| at(&s.kept, k) * n).sum::<f64>() / elements)
            .collect(),
        conflicting: merged.iter().map(|(s, n)| s.conflicting * n).sum::<f64>() / elements,
        relative_delta_norm: (0..parents).map(relative).collect(),
        cosine: cosine(&merged, parents),
    }
}

/// Cosine of the angle between the deltas of the first two models over all merged tensors.
fn cosine(merged: &[(&TensorStats, f64)], parents: usize) -> Option<f64> {
    let square = |k: usize| -> f64 {
        let norms = merged.iter().filter_map(|(s, _)| s.delta_norm.get(k));
        norms.map(|n| n * n).sum()
    };
    let lengths = (square(0) * square(1)).sqrt();
    let product: f64 = merged.iter().map(|(s, _)| s.delta_product).sum();
    (parents >= 2 && lengths > 0.0).then(|| product / lengths)
}

/// config.json, generation settings and tokenizer files. Nothing that names code goes along.
fn write_sidecars(recipe: &Recipe, parents: &Parents, out: &Path) -> Result<Vec<FileEntry>, CheckpointError> {
    let files = sidecars(recipe, parents)?;
    let written = files.iter().map(|(name, bytes)| write_small(out, name, bytes));
    written.collect()
}

/// The result's files beside its weights, by name: config.json, and those of its tokenizer.
pub fn sidecars(recipe: &Recipe, parents: &Parents) -> Result<Vec<(&'static str, Vec<u8>)>, CheckpointError> {
    let mut config = parents.reference().expert.checkpoint().config().clone();
    strip(&mut config);
    if let Some(dtype) = recipe.dtype {
        if config.contains_key("dtype") {
            config.insert("dtype".into(), dtype_name(dtype).into());
        }
        config.insert("torch_dtype".into(), dtype_name(dtype).into());
    }
    reshape(&mut config, recipe, parents);
    let mut files = vec![("config.json", pretty("config.json", &config)?)];
    for &name in SIDECAR_FILES {
        let owner = parents.owner_of(name, recipe).expert.checkpoint();
        let merged = parents.vocab.tokenizer.as_ref();
        if let Some(tokenizer) = merged.filter(|_| name == "tokenizer.json") {
            files.push((name, pretty(name, tokenizer)?));
            continue;
        }
        if merged.is_some() && OF_ONE_VOCABULARY.contains(&name) {
            continue;
        }
        let Some(mut bytes) = owner.read_sidecar(name)? else {
            continue;
        };
        if PARSED_SIDECARS.contains(&name)
            && let Some(mut entries) = read_sidecar(owner, name)?
        {
            let mut changed = strip(&mut entries);
            if let (Some(tokenizer), Some(decoder)) = (merged, entries.get_mut("added_tokens_decoder")) {
                *decoder = added_tokens_decoder(tokenizer);
                changed = true;
            }
            if changed {
                bytes = pretty(name, &entries)?;
            }
        }
        files.push((name, bytes));
    }
    Ok(files)
}

/// What tokenizer_config.json says of a tokenizer's added tokens.
fn added_tokens_decoder(tokenizer: &Value) -> Value {
    let added = tokenizer["added_tokens"].as_array().into_iter().flatten();
    let entries = added.filter_map(|token| {
        let mut entry = token.as_object()?.clone();
        let id = entry.shift_remove("id")?;
        Some((id.to_string(), Value::Object(entry)))
    });
    Value::Object(entries.collect())
}

/// What the config says of sizes that the recipe changes.
fn reshape(config: &mut Map<String, Value>, recipe: &Recipe, parents: &Parents) {
    if let Some(rows) = parents.vocab.rows() {
        config.insert("vocab_size".into(), rows.into());
    }
    let Some(layers) = parents.layout.layers else {
        return;
    };
    config.insert("num_hidden_layers".into(), layers.into());
    // One entry a layer (attention kinds): each layer keeps that of the layer it came from.
    let Some(kinds) = config.get("layer_types").and_then(Value::as_array).cloned() else {
        return;
    };
    let from = recipe.slices.iter().flat_map(|slice| {
        let first = slice.sources.first().map_or(0, |(_, from)| *from);
        first..first + slice.layers
    });
    let kinds = from.map(|layer| kinds.get(layer).or(kinds.last()).cloned().unwrap_or_default());
    config.insert("layer_types".into(), kinds.collect());
}

/// Takes out what could run foreign code or names a path, of nested configs too. Whether there was anything.
fn strip(entries: &mut Map<String, Value>) -> bool {
    let removed = DROPPED_CONFIG.iter().map(|key| entries.shift_remove(*key));
    let mut any = removed.fold(false, |any, entry| any | entry.is_some());
    for value in entries.values_mut() {
        if let Value::Object(nested) = value {
            any |= strip(nested);
        }
    }
    any
}

fn sync_folder(dir: &Path) -> Result<(), CheckpointError> {
    File::open(dir)
        .and_then(|folder| folder.sync_all())
        .map_err(|source| CheckpointError::Io {
            file: "the output folder".into(),
            source,
        })
}
