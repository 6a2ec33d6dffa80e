//! Recipe -> family -> point: exact, reproducible merging of fine-tuned language models.
//!
//! A recipe ([`RecipeSpec`], checked into [`Recipe`]) and its opened models ([`Parents`]) become a family: the passes
//! over the parents that do not depend on lambda. With the weights known, one fused pass streams every tensor through
//! f32 with one rounding at the end. The same recipe over the same content gives the same bytes on any number of
//! threads. This crate knows nothing of HTTP, jobs or serving.

mod card;
mod contents;
mod drops;
mod error;
mod family;
mod fusion;
mod geometry;
#[cfg(feature = "gpu")]
mod gpu;
mod journal;
mod json;
mod kernel;
mod layout;
mod magprune;
mod manifest;
mod masks;
mod mergekit;
mod mixup;
mod output;
mod parents;
mod point;
mod recipe;
mod relatives;
mod rng;
mod select;
mod selection;
mod setting;
mod sparsify;
mod spec;
mod stream;
mod thresholds;
mod trims;
mod vocab;

pub use error::{MergeError, RecipeError};
pub use family::Family;
#[cfg(feature = "gpu")]
pub use gpu::{Lease, Lender, Resident, Streamed, Written};
pub use journal::{is_resumable, merge_key};
pub use manifest::{
    MANIFEST_FILE, MANIFEST_FORMAT, MAX_MANIFEST_BYTES, Manifest, ParentEntry, Summary, TensorStats,
    parse_manifest, read_manifest, verify_folder, verify_folder_full,
};
pub use mergekit::parse_mergekit;
pub use mixup::{draw_lambda, draw_shares};
#[cfg(feature = "gpu")]
pub use output::merge_to_folder_on_gpu;
pub use output::{ARITHMETIC_VERSION, MergeOptions, Observer, merge_digest, merge_to_folder, sidecars};
pub use parents::{HoldWeights, ParentResolver, Parents};
pub use point::{Part, Point};
pub use recipe::{MAX_MODELS, Method, Mixup, ModelRef, Recipe};
pub use setting::{Place, Setting};
pub use spec::{
    MixupSpec, ModelEntry, RecipeSpec, SliceSource, SliceSpec, SparsifySpec, WeightedModel, parse_recipe,
    recipe_from_value,
};
