//! The shares that requests name, and recipes that leave them open.

use std::fmt;

use cauldron_merge::{MixupSpec, Recipe, RecipeError, RecipeSpec};

/// How the plain method is named.
const PLAIN: &str = "plain";
/// Of a number in a name: the smallest f64 is written without an exponent.
const MAX_DIGITS: usize = 400;
/// Shares of parents that a request may name at most.
const MAX_SHARES: usize = cauldron_merge::MAX_MODELS;

/// The shares of a family's parents: lambda of the first of two, or one number for each. None at all is the plain method.
#[derive(Debug, Clone, PartialEq)]
pub struct Shares(Vec<f64>);

impl Shares {
    pub fn lambda(lambda: f64) -> Self {
        Self::each(vec![lambda])
    }

    /// One number is lambda.
    pub fn each(mut shares: Vec<f64>) -> Self {
        // -0 is 0.
        shares.iter_mut().for_each(|share| *share += 0.0);
        Self(shares)
    }

    /// The recipe as it is, with the weights that its models have in it.
    pub fn plain() -> Self {
        Self(Vec::new())
    }

    /// Reads `0.35` or `0.2,0.3,0.5`.
    pub fn parse(text: &str) -> Option<Self> {
        if text == PLAIN {
            return Some(Self::plain());
        }
        let number = |part: &str| -> Option<f64> {
            let plain = !part.is_empty() && part.bytes().all(|c| c.is_ascii_digit() || c == b'.');
            part.parse().ok().filter(|_| plain && part.len() <= MAX_DIGITS)
        };
        let shares: Option<Vec<f64>> = text.split(',').take(MAX_SHARES + 1).map(number).collect();
        shares.filter(|shares| shares.len() <= MAX_SHARES).map(Self::each)
    }

    fn mixup(&self) -> Option<MixupSpec> {
        match self.0.as_slice() {
            [] => None,
            [lambda] => Some(MixupSpec {
                lambda: Some((*lambda).into()),
                ..MixupSpec::default()
            }),
            shares => Some(MixupSpec {
                shares: Some(shares.to_vec()),
                ..MixupSpec::default()
            }),
        }
    }
}

impl fmt::Display for Shares {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            f.write_str(PLAIN)?;
        }
        for (index, share) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            write!(f, "{comma}{share}")?;
        }
        Ok(())
    }
}

/// A recipe without shares.
#[derive(Debug, Clone)]
pub struct OpenRecipe {
    spec: RecipeSpec,
    models: usize,
}

impl OpenRecipe {
    /// Refuses what is no family.
    pub fn new(spec: RecipeSpec) -> Result<Self, RecipeError> {
        if let Some(mixup) = &spec.mixup
            && *mixup != MixupSpec::default()
        {
            let detail = "a family leaves the shares open; POST /merge merges with these";
            return Err(RecipeError::new("mixup", detail));
        }
        if spec.serve_as.is_some() {
            return Err(RecipeError::new("serve_as", "a family is served under its name"));
        }
        let open = Self {
            models: spec.models.len(),
            spec,
        };
        // Whatever else is wrong with it is wrong for all shares.
        open.at(&open.middle()).map_err(|e| match e.field.as_str() {
            "mixup.lambda" | "mixup.shares" => RecipeError::new("models", "a family has at least two models"),
            _ => e,
        })?;
        Ok(open)
    }

    pub fn spec(&self) -> &RecipeSpec {
        &self.spec
    }

    /// The recipe with these shares, as a client would post it.
    pub fn spec_at(&self, shares: &Shares) -> RecipeSpec {
        RecipeSpec {
            mixup: shares.mixup(),
            ..self.spec.clone()
        }
    }

    pub fn models(&self) -> usize {
        self.models
    }

    pub fn at(&self, shares: &Shares) -> Result<Recipe, RecipeError> {
        Recipe::from_spec(&self.spec_at(shares), &mut || 0)
    }

    /// Equal shares.
    pub fn middle(&self) -> Shares {
        match self.models {
            0..=2 => Shares::lambda(0.5),
            models => Shares::each(vec![1.0 / models as f64; models]),
        }
    }
}
