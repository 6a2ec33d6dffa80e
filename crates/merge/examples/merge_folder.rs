//! Merges one recipe from a models folder, without a server: `merge_folder MODELS RECIPE OUT` (JSON, or mergekit's YAML).

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use cauldron_merge::{
    MergeOptions, Observer, ParentResolver, Parents, Recipe, merge_to_folder, parse_mergekit, parse_recipe,
};

struct Folder(PathBuf);

impl ParentResolver for Folder {
    fn folder(&self, name: &str) -> Result<PathBuf, String> {
        Ok(self.0.join(name))
    }
}

#[derive(Default)]
struct Bytes(AtomicU64);

impl Observer for Bytes {
    fn advance(&self, bytes: u64) {
        self.0.fetch_add(bytes, Ordering::Relaxed);
    }

    fn cancelled(&self) -> bool {
        false
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().collect();
    let [_, models, recipe, out] = args.as_slice() else {
        return Err("usage: merge_folder MODELS RECIPE.json OUT".into());
    };
    let body = std::fs::read(recipe)?;
    let spec = match recipe.ends_with(".yaml") {
        true => parse_mergekit(&body)?,
        false => parse_recipe(&body)?,
    };
    let recipe = Recipe::from_spec(&spec, &mut || 0)?;
    let parents = Parents::open(&recipe, &Folder(models.into()))?;
    let bytes = Bytes::default();
    let start = Instant::now();
    std::fs::create_dir_all(out)?;
    let options = MergeOptions::default();
    let manifest = merge_to_folder(&recipe, &parents, Path::new(out), &options, &bytes)?;
    println!(
        "{} lambda {:?}: {:?}, {} of {} bytes; {:?}",
        manifest.digest,
        recipe.lambda(),
        start.elapsed(),
        bytes.0.into_inner(),
        parents.bytes_total(&recipe),
        manifest.summary
    );
    Ok(())
}
