//! The models of a recipe, opened: headers and configs are read, and whether they fit each other is known
//! before any weight is.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use cauldron_checkpoint::{
    Checkpoint, CheckpointError, Digest, Dtype, Expert, HeldWeights, Hold, Keeper, LetGo, Place, dtype_size,
    is_float,
};
use serde_json::{Map, Value};

use crate::contents::{ChunkLog, SourceContent};
use crate::layout::{Input, Layout, OutTensor, layer_of};
use crate::recipe::{ModelRef, Recipe, Vocab};
use crate::vocab::{VocabMaps, is_vocabulary};
use crate::{MergeError, Observer, RecipeError};

/// Finds the folder of one part of a model reference: `math` of `math`, `base` and then `lora` of `base+lora`.
pub trait ParentResolver: Sync {
    /// The error is a detail for the client: it shows no paths.
    fn folder(&self, name: &str) -> Result<PathBuf, String>;
}

/// Decides whose weights are held in memory.
pub trait HoldWeights {
    /// May have a checkpoint hold its weights, or an expert what its adapter makes of them. The identity is that of the files,
    /// where it may be kept.
    fn hold(&self, identity: Option<&str>, weights: Arc<dyn Hold>) -> Result<(), CheckpointError>;

    /// Room for so many bytes that follow from the parents, if there is ample.
    fn room(&self, _bytes: u64) -> Option<Box<dyn Keeper>> {
        None
    }

    /// What [`HoldWeights::room`] was given for will be in this place, where it may be let go, before it is there too.
    fn is_for(&self, _place: &Arc<Place>) {}
}

/// Nobody's.
impl HoldWeights for () {
    fn hold(&self, _: Option<&str>, _: Arc<dyn Hold>) -> Result<(), CheckpointError> {
        Ok(())
    }
}

/// What of the parents' weights is in memory.
#[derive(Debug, Default)]
pub(crate) struct InMemory {
    /// By source.
    files: Vec<Option<Arc<HeldWeights>>>,
    /// By model, what its adapter makes of the tensors that it changes; the base's comes last.
    folded: Vec<Option<Arc<HeldWeights>>>,
}

/// One parent or the base.
#[derive(Debug)]
pub(crate) struct Parent {
    pub reference: ModelRef,
    pub expert: Arc<Expert>,
    /// Index of its checkpoint in [`Parents::sources`]: parents over one base share its reads.
    pub source: usize,
}

/// The opened models of one recipe.
#[derive(Debug)]
pub struct Parents {
    pub(crate) sources: Vec<Arc<Checkpoint>>,
    pub(crate) base: Option<Parent>,
    pub(crate) models: Vec<Parent>,
    warnings: Vec<String>,
    pub(crate) layout: Layout,
    pub(crate) vocab: VocabMaps,
    /// State of each model's files when they were opened, the base's first.
    identities: Vec<String>,
    pub(crate) log: ChunkLog,
    /// One a source.
    source_contents: Vec<SourceContent>,
    contents: OnceLock<Vec<(ModelRef, Digest)>>,
}

/// Config fields that two models of one architecture must share for their weights to mean the same.
const SAME_CONFIG: &[&str] = &[
    "model_type",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
];
/// Config fields whose difference is only warned of.
const WARN_CONFIG: &[&str] = &[
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "sliding_window",
    "rms_norm_eps",
];

impl InMemory {
    /// Elements of a tensor of a source, as its files have them.
    pub fn elements(&self, parents: &Parents, input: &Input, range: Range<usize>) -> Option<(Dtype, &[u8])> {
        let held = self.files.get(input.source)?.as_ref()?;
        let source = &parents.sources[input.source];
        let info = source.get(&input.name)?;
        let item = dtype_size(info.dtype)? as usize;
        let bytes = source.bytes_of(held, info, range.start * item..range.end * item)?;
        Some((info.dtype, bytes))
    }

    /// Elements of a tensor that an adapter changes, as it makes them. No model: the base.
    pub fn folded(
        &self,
        parents: &Parents,
        model: Option<usize>,
        tensor: &str,
        range: Range<usize>,
    ) -> Option<(Dtype, &[u8])> {
        let (place, parent) = match model {
            Some(model) => (model, parents.models.get(model)?),
            None => (parents.models.len(), parents.base.as_ref()?),
        };
        let held = self.folded.get(place)?.as_ref()?;
        Some((Dtype::F32, parent.expert.folded(held, tensor, range)?))
    }
}

impl Parents {
    /// Opens all models and checks that they can be merged. Reads headers and configs only.
    pub fn open(recipe: &Recipe, resolver: &dyn ParentResolver) -> Result<Self, RecipeError> {
        let mut sources = Sources::default();
        let base = match &recipe.base {
            Some(reference) => Some(sources.open("base", reference, resolver)?),
            None => None,
        };
        let mut models = Vec::new();
        for (index, model) in recipe.models.iter().enumerate() {
            models.push(sources.open(&format!("models[{index}]"), &model.reference, resolver)?);
        }
        let mut parents = Self {
            sources: sources.open,
            base,
            models,
            warnings: Vec::new(),
            layout: Layout {
                tensors: Vec::new(),
                layers: None,
            },
            vocab: VocabMaps::default(),
            identities: Vec::new(),
            log: ChunkLog::default(),
            source_contents: Vec::new(),
            contents: OnceLock::new(),
        };
        let mut identities = Vec::new();
        for (field, parent) in parents.fields() {
            let identity = parent.expert.identity();
            identities.push(identity.map_err(|e| RecipeError::new(field, e.to_string()))?);
        }
        parents.identities = identities;
        let contents: Result<_, _> = (0..parents.sources.len())
            .map(|source| {
                let content = SourceContent::of(&parents.sources[source]);
                content.map_err(|e| RecipeError::new(parents.field_of(source), e.to_string()))
            })
            .collect();
        parents.source_contents = contents?;
        parents.check_fit(recipe)?;
        parents.check_sidecars(recipe)?;
        let checkpoints: Vec<&Checkpoint> = parents.sources.iter().map(|s| &**s).collect();
        let base = parents.base.as_ref().map(|b| b.source);
        let owner = parents.tokenizer_owner(recipe).source;
        parents.vocab = VocabMaps::new(recipe, &checkpoints, owner, base, &|source| parents.label(source))?;
        parents.check_adapters(recipe)?;
        parents.layout = Layout::new(recipe, &parents, &parents.vocab)?;
        Ok(parents)
    }

    /// The model whose tensor set, dtypes and config the result has: the base, or else the first model.
    pub(crate) fn reference(&self) -> &Parent {
        self.base.as_ref().unwrap_or(&self.models[0])
    }

    /// The model whose tokenizer files the result gets.
    pub(crate) fn tokenizer_owner(&self, recipe: &Recipe) -> &Parent {
        let wanted = recipe.tokenizer.as_ref();
        wanted
            .and_then(|reference| self.all().find(|p| p.reference == *reference))
            .unwrap_or_else(|| self.reference())
    }

    /// Base and models, with the field that names each.
    fn fields(&self) -> impl Iterator<Item = (String, &Parent)> {
        let base = self.base.iter().map(|parent| ("base".to_owned(), parent));
        let models = self.models.iter().enumerate();
        base.chain(models.map(|(index, parent)| (format!("models[{index}]"), parent)))
    }

    fn field_of(&self, source: usize) -> String {
        let mut found = self.fields().filter(|(_, parent)| parent.source == source);
        found.next().map(|(field, _)| field).unwrap_or_default()
    }

    /// What a model is called whose checkpoint this is.
    pub(crate) fn label(&self, source: usize) -> String {
        let found = self.all().find(|parent| parent.source == source);
        found.map_or_else(String::new, |parent| parent.reference.to_string())
    }

    /// The JSON files that the result gets are read before any weight is.
    fn check_sidecars(&self, recipe: &Recipe) -> Result<(), RecipeError> {
        for name in PARSED_SIDECARS {
            let owner = self.owner_of(name, recipe);
            read_sidecar(owner.expert.checkpoint(), name)
                .map_err(|e| RecipeError::new(self.field_of(owner.source), e.to_string()))?;
        }
        Ok(())
    }

    /// The model that a file beside the weights comes from.
    pub(crate) fn owner_of(&self, sidecar: &str, recipe: &Recipe) -> &Parent {
        match sidecar {
            "generation_config.json" => self.reference(),
            _ => self.tokenizer_owner(recipe),
        }
    }

    /// Base first, then the models in order.
    pub(crate) fn all(&self) -> impl Iterator<Item = &Parent> {
        self.base.iter().chain(&self.models)
    }

    /// Differences that do not forbid the merge but that its user should know of.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// A cheap fingerprint of all files: equal while nothing was written to them.
    pub fn identity(&self) -> Result<String, MergeError> {
        let parts: Result<Vec<String>, _> = self
            .all()
            .map(|p| {
                let identity = p.expert.identity();
                identity.map_err(|e| MergeError::parent(&p.reference.to_string(), e))
            })
            .collect();
        Ok(parts?.join("|"))
    }

    /// Bytes of the result's tensors.
    pub fn output_bytes(&self) -> u64 {
        self.layout.tensors.iter().map(|t| t.plan.byte_len()).sum()
    }

    /// Total of all `advance` calls of [`crate::merge_to_folder`].
    pub fn bytes_total(&self, recipe: &Recipe) -> u64 {
        self.input_bytes() * crate::family::passes(recipe)
    }

    /// Bytes that the distinct inputs of a tensor hold for one element.
    pub(crate) fn bytes_per_element(&self, tensor: &OutTensor) -> u64 {
        let inputs = tensor.inputs().into_iter();
        let sizes = inputs.filter_map(|input| dtype_size(self.sources[input.source].get(&input.name)?.dtype));
        sizes.sum()
    }

    /// Content digests of base and models, in that order. What a merge has read is not read again.
    pub(crate) fn contents(&self, obs: &dyn Observer) -> Result<&[(ModelRef, Digest)], MergeError> {
        if let Some(contents) = self.contents.get() {
            return Ok(contents);
        }
        let go_on = |_| !obs.cancelled();
        let mut digests = Vec::new();
        for parent in self.all() {
            let failed = |e| MergeError::parent(&parent.reference.to_string(), e);
            let content = &self.source_contents[parent.source].digest;
            let checkpoint = match content.get() {
                Some(digest) => *digest,
                None => {
                    let known = self.log.tensors(parent.source);
                    let digest = self.sources[parent.source]
                        .content_digest(&known, &go_on)
                        .map_err(failed)?;
                    *content.get_or_init(|| digest)
                }
            };
            let digest = parent.expert.with_adapter_digest(checkpoint).map_err(failed)?;
            digests.push((parent.reference.clone(), digest));
        }
        Ok(self.contents.get_or_init(|| digests))
    }

    /// Name, dtype and shape of the result's tensors, in writing order.
    pub fn result_tensors(&self) -> impl Iterator<Item = (&str, Dtype, &[usize])> {
        let plans = self.layout.tensors.iter().map(|tensor| &tensor.plan);
        plans.map(|plan| (plan.name.as_str(), plan.dtype, plan.shape.as_slice()))
    }

    /// Bytes of all tensors that a point reads.
    pub fn input_bytes(&self) -> u64 {
        let of = |tensor: &OutTensor| self.bytes_per_element(tensor) * tensor.plan.numel() as u64;
        self.layout.tensors.iter().map(of).sum()
    }

    /// Whether nothing has to be read for the digest of a source any more.
    pub(crate) fn has_content(&self, source: usize) -> bool {
        self.source_contents[source].digest.get().is_some()
    }

    /// Takes over content digests that [`Self::contents_to_keep`] gave before, by the identity of a checkpoint's files.
    /// Returns whether those of all parents are known now, so that [`crate::merge_digest`] reads no weights.
    pub fn adopt_contents(&self, known: &dyn Fn(&str) -> Option<Digest>) -> bool {
        for content in self.source_contents.iter().filter(|c| c.settled) {
            if let Some(digest) = known(&content.identity) {
                let _ = content.digest.set(digest);
            }
        }
        self.source_contents.iter().all(|c| c.digest.get().is_some())
    }

    /// Identities and content digests of the checkpoints that are known and may be kept: with the same identity the
    /// content is the same.
    pub fn contents_to_keep(&self) -> impl Iterator<Item = (&str, Digest)> {
        let settled = self.source_contents.iter().filter(|c| c.settled);
        settled.filter_map(|c| Some((c.identity.as_str(), *c.digest.get()?)))
    }

    /// Has checkpoints hold their weights in memory, and experts what their adapters make of them.
    pub fn hold_weights(&self, hold: &dyn HoldWeights) -> Result<(), MergeError> {
        for (source, (checkpoint, content)) in self.sources.iter().zip(&self.source_contents).enumerate() {
            let identity = content.settled.then_some(content.identity.as_str());
            hold.hold(identity, checkpoint.clone())
                .map_err(|e| MergeError::parent(&self.label(source), e))?;
        }
        for (parent, identity) in self.all().zip(&self.identities) {
            if parent.expert.adapter().is_none() {
                continue;
            }
            let may_be_kept = parent.expert.is_settled();
            may_be_kept
                .and_then(|may| hold.hold(may.then_some(identity.as_str()), parent.expert.clone()))
                .map_err(|e| MergeError::parent(&parent.reference.to_string(), e))?;
        }
        Ok(())
    }

    /// What is in memory now.
    pub(crate) fn held(&self) -> InMemory {
        let folded = self.models.iter().chain(&self.base);
        InMemory {
            files: self.sources.iter().map(|source| source.held()).collect(),
            folded: folded.map(|parent| parent.expert.held()).collect(),
        }
    }

    /// Bytes of the weights that are in memory.
    pub fn held_bytes(&self) -> u64 {
        let InMemory { files, folded } = self.held();
        let held = files.iter().chain(&folded).flatten();
        held.map(|held| held.byte_len()).sum()
    }

    /// The files must be the ones that were opened and digested: a parent that is rewritten under a merge would give a
    /// result that its recipe does not name.
    pub fn check_unchanged(&self) -> Result<(), MergeError> {
        for (parent, before) in self.all().zip(&self.identities) {
            let name = parent.reference.to_string();
            let now = parent
                .expert
                .identity()
                .map_err(|e| MergeError::parent(&name, e))?;
            if now != *before {
                return Err(MergeError::ParentChanged { parent: name });
            }
        }
        Ok(())
    }

    /// An adapter of a vocabulary's rows knows only the rows it was made for.
    fn check_adapters(&self, recipe: &Recipe) -> Result<(), RecipeError> {
        let by_text = matches!(recipe.vocab, Vocab::Union | Vocab::Align);
        let any = (0..self.sources.len()).any(|source| self.vocab.map(source).is_some());
        for (field, parent) in self.fields() {
            // By text, rows go to other models too.
            let mapped = self.vocab.map(parent.source).is_some() || (by_text && any);
            let target = parent
                .expert
                .adapter()
                .and_then(|a| a.targets().find(|t| is_vocabulary(t)));
            if let (true, Some(target)) = (mapped, target) {
                let detail = format!("its adapter changes {target}, whose rows the vocabulary policy moves");
                return Err(RecipeError::new(field, detail));
            }
        }
        Ok(())
    }

    fn check_fit(&mut self, recipe: &Recipe) -> Result<(), RecipeError> {
        let reference = self.reference();
        let reference_field = if self.base.is_some() { "base" } else { "models[0]" };
        check_dtypes(reference_field, reference.expert.checkpoint())?;
        let mut warnings = Vec::new();
        for (index, model) in self.models.iter().enumerate() {
            if model.source == reference.source {
                continue;
            }
            let field = format!("models[{index}]");
            let (ours, theirs) = (model.expert.checkpoint(), reference.expert.checkpoint());
            check_dtypes(&field, ours)?;
            let fit = Fit {
                field: &field,
                ours,
                theirs,
                other: reference_field,
                recipe,
            };
            fit.config(&mut warnings)?;
            fit.tensors()?;
        }
        self.warnings = warnings;
        Ok(())
    }
}

/// Sidecars that are JSON objects, of which entries may be taken out.
pub(crate) const PARSED_SIDECARS: [&str; 2] = ["generation_config.json", "tokenizer_config.json"];

/// One of [`PARSED_SIDECARS`], if the model has it.
pub(crate) fn read_sidecar(
    checkpoint: &Checkpoint,
    name: &str,
) -> Result<Option<Map<String, Value>>, CheckpointError> {
    let Some(bytes) = checkpoint.read_sidecar(name)? else {
        return Ok(None);
    };
    let parsed = serde_json::from_slice(&bytes);
    parsed.map(Some).map_err(|e| CheckpointError::Malformed {
        file: name.to_owned(),
        detail: e.to_string(),
    })
}

/// Checkpoints by folder, so that each is opened once.
#[derive(Default)]
struct Sources {
    open: Vec<Arc<Checkpoint>>,
    by_folder: HashMap<PathBuf, usize>,
}

impl Sources {
    fn open(
        &mut self,
        field: &str,
        reference: &ModelRef,
        resolver: &dyn ParentResolver,
    ) -> Result<Parent, RecipeError> {
        let bad = |detail: String| RecipeError::new(field, detail);
        let folder = resolver.folder(&reference.source).map_err(bad)?;
        let source = match self.by_folder.get(&folder) {
            Some(index) => *index,
            None => {
                let checkpoint = open_folder(&folder).map_err(|e| bad(e.to_string()))?;
                self.open.push(Arc::new(checkpoint));
                self.by_folder.insert(folder, self.open.len() - 1);
                self.open.len() - 1
            }
        };
        let adapter = match &reference.adapter {
            Some(name) => Some(resolver.folder(name).map_err(bad)?),
            None => None,
        };
        let expert = Expert::over(self.open[source].clone(), adapter.as_deref())
            .map_err(|e| bad(format!("adapter: {e}")))?;
        Ok(Parent {
            reference: reference.clone(),
            expert: Arc::new(expert),
            source,
        })
    }
}

fn open_folder(folder: &Path) -> Result<Checkpoint, CheckpointError> {
    let checkpoint = Checkpoint::open(folder)?;
    if checkpoint.config().contains_key("quantization_config") {
        return Err(CheckpointError::Malformed {
            file: "config.json".into(),
            detail: "quantised checkpoints cannot be merged".into(),
        });
    }
    Ok(checkpoint)
}

/// Floats are merged, integers and bools copied; FP8, F64 and the rest are refused by name.
fn check_dtypes(field: &str, checkpoint: &Checkpoint) -> Result<(), RecipeError> {
    let copied = [
        Dtype::BOOL,
        Dtype::U8,
        Dtype::I8,
        Dtype::I16,
        Dtype::U16,
        Dtype::I32,
        Dtype::U32,
        Dtype::I64,
        Dtype::U64,
    ];
    for (name, info) in checkpoint.tensors() {
        if !is_float(info.dtype) && (!copied.contains(&info.dtype) || dtype_size(info.dtype).is_none()) {
            let detail = format!("tensor {name} has dtype {:?}, which cannot be merged", info.dtype);
            return Err(RecipeError::new(field, detail));
        }
    }
    Ok(())
}

/// One model held against the reference.
struct Fit<'a> {
    field: &'a str,
    ours: &'a Checkpoint,
    theirs: &'a Checkpoint,
    other: &'a str,
    recipe: &'a Recipe,
}

impl Fit<'_> {
    fn refuse<T>(&self, detail: String) -> Result<T, RecipeError> {
        Err(RecipeError::new(self.field, detail))
    }

    fn config(&self, warnings: &mut Vec<String>) -> Result<(), RecipeError> {
        let get = |c: &Checkpoint, key: &str| c.config().get(key).cloned().unwrap_or(Value::Null);
        // Vocabulary first: it also shows in shapes, but as the cause it is what a user understands.
        let vocab = |c: &Checkpoint| {
            c.get("model.embed_tokens.weight")
                .map(|t| t.shape.clone())
                .unwrap_or_default()
        };
        let (ours, theirs) = (vocab(self.ours), vocab(self.theirs));
        if self.strict() && ours != theirs && ours.get(1) == theirs.get(1) {
            return self.refuse(format!(
                "vocab strict: model.embed_tokens.weight is {ours:?}, that of {} is {theirs:?}",
                self.other
            ));
        }
        for key in SAME_CONFIG {
            let (mut ours, mut theirs) = (get(self.ours, key), get(self.theirs, key));
            // A stored head means nothing to loaders that tie it: whether they do must be said alike.
            if *key == "tie_word_embeddings" && self.theirs.get("lm_head.weight").is_some() {
                for tied in [&mut ours, &mut theirs] {
                    if tied.is_null() {
                        *tied = Value::Bool(false);
                    }
                }
            }
            // Absent and null are the architecture's default: only two given values can contradict.
            if ours != theirs && !ours.is_null() && !theirs.is_null() {
                return self.refuse(format!(
                    "config {key} is {ours}, that of {} is {theirs}",
                    self.other
                ));
            }
        }
        for key in WARN_CONFIG {
            let (ours, theirs) = (get(self.ours, key), get(self.theirs, key));
            if ours != theirs {
                warnings.push(format!(
                    "{}: config {key} is {ours}, that of {} is {theirs}; the result has the latter",
                    self.field, self.other
                ));
            }
        }
        Ok(())
    }

    fn may_lack(&self, name: &str) -> bool {
        !self.recipe.slices.is_empty() && layer_of(name).is_some()
    }

    fn strict(&self) -> bool {
        self.recipe.vocab == Vocab::Strict
    }

    /// Whether shapes are the same for all that the vocabulary policy does not decide.
    fn same_shape(&self, name: &str, ours: &[usize], theirs: &[usize]) -> bool {
        let from = usize::from(
            !self.strict() && is_vocabulary(name) && ours.len() == theirs.len() && !ours.is_empty(),
        );
        ours[from..] == theirs[from..]
    }

    /// Names the first difference of each kind. Where layers are cut and joined, the numbers of layers may differ.
    fn tensors(&self) -> Result<(), RecipeError> {
        let (ours, theirs) = (self.ours.tensors(), self.theirs.tensors());
        let mut found: BTreeMap<&str, String> = BTreeMap::new();
        for (name, info) in theirs {
            match ours.get(name) {
                None if self.may_lack(name) => {}
                None => {
                    found
                        .entry("lacks")
                        .or_insert_with(|| format!("lacks tensor {name}"));
                }
                Some(own) if !self.same_shape(name, &own.shape, &info.shape) => {
                    found.entry("shape").or_insert_with(|| {
                        format!(
                            "tensor {name} is {:?}, that of {} is {:?}",
                            own.shape, self.other, info.shape
                        )
                    });
                }
                Some(own)
                    if is_float(own.dtype) != is_float(info.dtype)
                        || (!is_float(own.dtype) && own.dtype != info.dtype) =>
                {
                    found.entry("dtype").or_insert_with(|| {
                        format!(
                            "tensor {name} is {:?}, that of {} is {:?}",
                            own.dtype, self.other, info.dtype
                        )
                    });
                }
                Some(_) => {}
            }
        }
        let extra = ours
            .keys()
            .find(|name| !theirs.contains_key(*name) && !self.may_lack(name));
        if let Some(extra) = extra {
            found.insert("extra", format!("has tensor {extra}, which {} lacks", self.other));
        }
        match found.is_empty() {
            true => Ok(()),
            false => self.refuse(found.into_values().collect::<Vec<_>>().join("; ")),
        }
    }
}
