//! Families in a GPU's memory: whether their points have the CPU's bytes, and how fast they are.
//!
//! `resident MODELS_FOLDER CHECK|TIME|RESET RECIPE.json...`: every recipe's models are folders of MODELS_FOLDER. CHECK compares all
//! tensors of some points with those of the CPU; TIME runs the pass again and again; RESET does as CHECK after the GPU was used,
//! reset and opened anew, as a service does where it failed. Prints a line of JSON a recipe.

use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::Device;
use cauldron_gpu::Gpu;
use cauldron_merge::{Family, Observer, ParentResolver, Parents, Recipe, Resident, parse_recipe};

struct Quiet;

impl Observer for Quiet {
    fn advance(&self, _: u64) {}

    fn cancelled(&self) -> bool {
        false
    }
}

struct Folder(PathBuf);

impl ParentResolver for Folder {
    fn folder(&self, name: &str) -> Result<PathBuf, String> {
        Ok(self.0.join(name))
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(models), Some(mode)) = (args.next(), args.next()) else {
        return Err("usage: resident MODELS_FOLDER CHECK|TIME|RESET RECIPE.json...".into());
    };
    if mode == "RESET" {
        let device = Device::new_cuda_with_stream(0)?;
        let gpu = Gpu::new(&device)?;
        drop(gpu.upload(&[1; 1 << 20])?);
        gpu.synchronize()?;
        drop(gpu);
        // As a station does: the last copy would close libraries whose context has gone.
        Box::leak(Box::new(device));
        cauldron_gpu::reset(0)?;
    }
    let gpu = Gpu::new(&Device::new_cuda_with_stream(0)?)?;
    let mut all_are_right = true;
    for path in args {
        let recipe = Recipe::from_spec(&parse_recipe(&std::fs::read(&path)?)?, &mut || 0)?;
        let parents = Parents::open(&recipe, &Folder(models.clone().into()))?;
        let name = Path::new(&path)
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let start = Instant::now();
        // As the service does.
        let family = Family::prepare_for_points(&recipe, &parents, &(), &Quiet)?;
        let prepared = start.elapsed().as_secs_f64();
        let start = Instant::now();
        let resident = match Resident::load(&family, gpu.clone(), &Quiet) {
            Ok(resident) => resident,
            Err(e) => {
                println!("{{\"recipe\": \"{name}\", \"refused\": \"{e}\"}}");
                all_are_right = false;
                continue;
            }
        };
        let mut written = resident.room()?;
        gpu.synchronize()?;
        let loaded = start.elapsed().as_secs_f64();
        let lambdas: &[Option<f64>] = match recipe.lambda().is_some() {
            true => &[None, Some(0.0), Some(0.35), Some(1.0)],
            false => &[None],
        };
        let (mut tensors, mut different, mut bytes) = (0, Vec::new(), 0u64);
        for lambda in lambdas {
            let point = family.point(*lambda)?;
            resident.write(&point, &mut written)?;
            resident.finish(&written)?;
            if mode == "TIME" {
                break;
            }
            for index in 0..point.tensor_names().count() {
                let (_, _, exact) = point.tensor(index, &Quiet)?;
                let ours = resident.tensor(&written, index)?;
                tensors += 1;
                bytes += exact.len() as u64;
                if ours != exact {
                    let at = ours.iter().zip(&exact).position(|(a, b)| a != b);
                    let tensor = point.tensor_names().nth(index).unwrap_or_default();
                    different.push(format!("{tensor} from byte {at:?} at lambda {lambda:?}"));
                }
            }
        }
        if mode == "TIME" {
            let point = family.point(lambdas[lambdas.len().min(3) - 1])?;
            let mut seconds: Vec<f64> = Vec::new();
            for _ in 0..20 {
                let start = Instant::now();
                resident.write(&point, &mut written)?;
                gpu.synchronize()?;
                seconds.push(start.elapsed().as_secs_f64());
            }
            seconds.sort_by(f64::total_cmp);
            let median = seconds[seconds.len() / 2];
            let moved = (resident.bytes() + parents.output_bytes()) as f64;
            println!(
                "{{\"recipe\": \"{name}\", \"prepare_s\": {prepared:.2}, \"load_s\": {loaded:.2}, \"resident_bytes\": {}, \
                 \"point_ms\": {:.3}, \"gb_per_s\": {:.1}}}",
                resident.bytes(),
                median * 1e3,
                moved / median / 1e9
            );
            continue;
        }
        all_are_right &= different.is_empty();
        println!(
            "{{\"recipe\": \"{name}\", \"tensors\": {tensors}, \"bytes\": {bytes}, \"different\": {}, \"first\": \"{}\"}}",
            different.len(),
            different.first().cloned().unwrap_or_default().replace('"', "'")
        );
    }
    match all_are_right {
        true => Ok(()),
        false => Err("bytes differ, or a recipe was refused".into()),
    }
}
