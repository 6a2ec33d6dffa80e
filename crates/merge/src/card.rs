//! README.md of a merged checkpoint: the model card, as the Hugging Face hub reads it.

use std::fmt::Write;

use crate::manifest::Manifest;

/// Renders the card from the manifest; the same manifest gives the same bytes.
pub(crate) fn render(manifest: &Manifest) -> String {
    let mut card = String::from("---\nlibrary_name: transformers\ntags:\n- merge\n- cauldron\n---\n\n");
    // Writing to a String cannot fail.
    let _ = write_body(&mut card, manifest);
    card
}

fn write_body(card: &mut String, manifest: &Manifest) -> std::fmt::Result {
    let method = manifest.recipe["method"].as_str().unwrap_or("merge");
    writeln!(card, "# Merged by Cauldron: {method}\n")?;
    writeln!(
        card,
        "| role | model | content digest (BLAKE3) |\n| --- | --- | --- |"
    )?;
    for parent in &manifest.parents {
        writeln!(
            card,
            "| {} | {} | `{}` |",
            parent.role,
            inline_code(&parent.reference),
            parent.content
        )?;
    }
    if let Some(lambda) = manifest.lambda {
        writeln!(
            card,
            "\nContribution ratio lambda = {lambda} of the first model, 1 - lambda of the second (Mixup Model Merge, \
             arXiv 2502.15434)."
        )?;
    }
    let summary = &manifest.summary;
    if !summary.kept.is_empty() {
        writeln!(
            card,
            "\n| model | kept | norm of delta / norm of base |\n| --- | --- | --- |"
        )?;
        for (i, (kept, norm)) in summary.kept.iter().zip(&summary.relative_delta_norm).enumerate() {
            writeln!(card, "| models[{i}] | {:.2} % | {norm:.4} |", kept * 100.0)?;
        }
        writeln!(
            card,
            "\nElements with deltas of both signs: {:.2} %.",
            summary.conflicting * 100.0
        )?;
    }
    for warning in &manifest.warnings {
        writeln!(card, "\nWarning: {}", inline_code(warning))?;
    }
    let recipe = serde_json::to_string_pretty(&manifest.recipe).unwrap_or_default();
    writeln!(
        card,
        "\nRecipe digest `{}`, arithmetic version {}. The same recipe over the same content gives the same bytes:\n",
        manifest.digest, manifest.arithmetic
    )?;
    writeln!(card, "```json\n{recipe}\n```")
}

/// References come from requests: nothing in them is markup.
fn inline_code(text: &str) -> String {
    format!("`{}`", text.replace('`', "'").replace('|', "\\|"))
}
