//! The shares that requests name, and recipes that leave them open.

use std::fmt;

use cauldron_merge::{MixupSpec, Recipe, RecipeError, RecipeSpec, Setting};
use serde::{Deserialize, Serialize};

/// How the plain method is named.
const PLAIN: &str = "plain";
/// Stands before a scaling in a name.
const TIMES: char = 'x';
/// Of a number in a name: the smallest f64 is written without an exponent.
const MAX_DIGITS: usize = 400;
/// Shares of parents that a request may name at most.
const MAX_SHARES: usize = cauldron_merge::MAX_MODELS;
/// Lambdas over the layers that a request may name at most.
pub const MAX_ANCHORS: usize = 64;

/// The shares of a family's parents. In JSON a list, `[]` for the plain method; lambdas by layer are `{"by_layer": [...]}`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(from = "Form", into = "Form")]
pub enum Shares {
    /// The recipe as it is, with the weights that its models have in it.
    Plain,
    /// lambda of the first of two parents.
    Lambda(f64),
    /// One number for each parent.
    Each(Vec<f64>),
    /// lambdas of the first of two parents at equal distances over the layers, the others between them; what is outside the
    /// layers has the first.
    ByLayer(Vec<f64>),
    /// Shares of the other kinds, and the scaling of what they give in the recipe's place.
    Scaled(Box<Self>, f64),
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Form {
    List(Vec<f64>),
    Layers { by_layer: Vec<f64> },
    Scaled { of: Box<Shares>, scaling: f64 },
}

impl From<Form> for Shares {
    fn from(form: Form) -> Self {
        match form {
            Form::List(shares) => Self::each(shares),
            Form::Layers { by_layer } => Self::by_layer(by_layer),
            Form::Scaled { of, scaling } => Self::Scaled(of, scaling),
        }
    }
}

impl From<Shares> for Form {
    fn from(shares: Shares) -> Self {
        match shares {
            Shares::Plain => Self::List(Vec::new()),
            Shares::Lambda(lambda) => Self::List(vec![lambda]),
            Shares::Each(shares) => Self::List(shares),
            Shares::ByLayer(by_layer) => Self::Layers { by_layer },
            Shares::Scaled(of, scaling) => Self::Scaled { of, scaling },
        }
    }
}

impl Shares {
    pub fn lambda(lambda: f64) -> Self {
        // -0 is 0.
        Self::Lambda(lambda + 0.0)
    }

    /// One number is lambda; none at all is the plain method.
    pub fn each(mut shares: Vec<f64>) -> Self {
        shares.iter_mut().for_each(|share| *share += 0.0);
        match shares.as_slice() {
            [] => Self::Plain,
            [lambda] => Self::Lambda(*lambda),
            _ => Self::Each(shares),
        }
    }

    pub fn by_layer(mut lambdas: Vec<f64>) -> Self {
        lambdas.iter_mut().for_each(|lambda| *lambda += 0.0);
        Self::ByLayer(lambdas)
    }

    /// These shares with another scaling than the recipe's.
    pub fn scaled(self, scaling: f64) -> Self {
        Self::Scaled(Box::new(self), scaling + 0.0)
    }

    /// Reads `0.35`, `0.2,0.3,0.5` or `0.2:0.9`, and each with a scaling after it: `0.35x0.8`.
    pub fn parse(text: &str) -> Option<Self> {
        if text == PLAIN {
            return Some(Self::Plain);
        }
        let number = |part: &str| -> Option<f64> {
            let plain = !part.is_empty() && part.bytes().all(|c| c.is_ascii_digit() || c == b'.');
            part.parse().ok().filter(|_| plain && part.len() <= MAX_DIGITS)
        };
        if let Some((of, scaling)) = text.split_once(TIMES) {
            let of = Self::parse(of).filter(|of| !matches!(of, Self::Plain | Self::Scaled(..)))?;
            return Some(of.scaled(number(scaling)?));
        }
        let numbers = |between: char, most: usize| -> Option<Vec<f64>> {
            let found: Option<Vec<f64>> = text.split(between).take(most + 1).map(number).collect();
            found.filter(|found| found.len() <= most)
        };
        match text.contains(':') {
            true => numbers(':', MAX_ANCHORS).map(Self::by_layer),
            false => numbers(',', MAX_SHARES).map(Self::each),
        }
    }

    /// lambda, where it is one number; of lambdas by layer their mean.
    pub fn mean_lambda(&self) -> Option<f64> {
        match self {
            Self::Lambda(lambda) => Some(*lambda),
            Self::ByLayer(lambdas) => Some(lambdas.iter().sum::<f64>() / lambdas.len().max(1) as f64),
            Self::Plain | Self::Each(_) => None,
            Self::Scaled(of, _) => of.mean_lambda(),
        }
    }

    pub fn scaling(&self) -> Option<f64> {
        match self {
            Self::Scaled(_, scaling) => Some(*scaling),
            _ => None,
        }
    }

    fn mixup(&self) -> Option<MixupSpec> {
        let of_lambda = |lambda: Setting| MixupSpec {
            lambda: Some(lambda),
            ..MixupSpec::default()
        };
        match self {
            Self::Plain => None,
            Self::Lambda(lambda) => Some(of_lambda((*lambda).into())),
            Self::ByLayer(lambdas) => Some(of_lambda(Setting::gradient(lambdas.clone()))),
            Self::Each(shares) => Some(MixupSpec {
                shares: Some(shares.clone()),
                ..MixupSpec::default()
            }),
            Self::Scaled(of, _) => of.mixup(),
        }
    }
}

impl fmt::Display for Shares {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (numbers, between) = match self {
            Self::Plain => return f.write_str(PLAIN),
            Self::Lambda(lambda) => return write!(f, "{lambda}"),
            Self::Each(shares) => (shares, ","),
            Self::ByLayer(lambdas) => (lambdas, ":"),
            Self::Scaled(of, scaling) => return write!(f, "{of}{TIMES}{scaling}"),
        };
        for (index, number) in numbers.iter().enumerate() {
            let between = if index == 0 { "" } else { between };
            write!(f, "{between}{number}")?;
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
            scaling: shares
                .scaling()
                .map(Setting::from)
                .or_else(|| self.spec.scaling.clone()),
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
