//! The next token of each sequence: on the device where nothing but the logits decides, else from logits that come from it.

use std::collections::BTreeMap;

use candle_core::Tensor;
use rayon::prelude::*;

use super::{DeviceCare, Engine, Sequence, computed};
#[cfg(feature = "cuda")]
use crate::sampler::Chance;
use crate::scoring::{NO_LOGPROB, Target, score_rows};
use crate::{FinishReason, LmError, TokenLogprobs, score_logits};

/// A token that was drawn, or why none could be.
pub(super) struct Drawn {
    pub token: Result<u32, Undrawn>,
    pub logprobs: Option<TokenLogprobs>,
}

pub(super) struct Undrawn {
    pub error: String,
    /// Of the request, if it is at fault.
    pub field: Option<&'static str>,
}

impl Drawn {
    fn failed(error: String, field: Option<&'static str>) -> Self {
        Self {
            token: Err(Undrawn { error, field }),
            logprobs: None,
        }
    }
}

impl Engine {
    /// Draws the next token of each sequence from its row.
    pub(super) fn draw(
        &mut self,
        rows: &[(u64, u32)],
        hidden: &Tensor,
        care: &mut dyn DeviceCare,
    ) -> Result<(), LmError> {
        let mut draw = Vec::with_capacity(rows.len());
        for (id, row) in rows {
            match self.sequences.get(id) {
                Some(sequence) if sequence.answered < sequence.request.max_tokens => draw.push((*id, *row)),
                _ => self.finish(*id, FinishReason::Length),
            }
        }
        if self.decoder.summarizes() {
            self.draw_likeliest(&mut draw, hidden, care)?;
        }
        #[cfg(feature = "cuda")]
        self.draw_there(&mut draw, hidden, care)?;
        if draw.is_empty() {
            return Ok(());
        }
        let places: Vec<u32> = draw.iter().map(|(_, row)| *row).collect();
        let logits = computed(care, || {
            let places = Tensor::from_slice(&places, draw.len(), hidden.device())?;
            let logits = self.decoder.logits(&hidden.index_select(&places, 0)?)?;
            Ok(logits.to_vec2::<f32>()?)
        })?;
        let mut drawing: BTreeMap<u64, Vec<f32>> = draw.iter().map(|(id, _)| *id).zip(logits).collect();
        let drawn: Vec<(u64, Drawn)> = self
            .sequences
            .iter_mut()
            .filter_map(|(id, sequence)| Some((*id, sequence, drawing.remove(id)?)))
            .collect::<Vec<_>>()
            .into_par_iter()
            .map(|(id, sequence, logits)| (id, sequence.draw(logits)))
            .collect();
        for (id, drawn) in drawn {
            self.take(id, drawn);
        }
        Ok(())
    }

    /// Draws for the sequences that take the likeliest token whatever came before, without their logits.
    fn draw_likeliest(
        &mut self,
        rows: &mut Vec<(u64, u32)>,
        hidden: &Tensor,
        care: &mut dyn DeviceCare,
    ) -> Result<(), LmError> {
        let plain = |id: &u64| self.sequences.get(id).and_then(Sequence::takes_likeliest);
        let mut likeliest = Vec::new();
        rows.retain(|(id, row)| match plain(id) {
            None => true,
            Some(top) => {
                likeliest.push((*id, top, *row));
                false
            }
        });
        let targets: Vec<Target> = likeliest
            .iter()
            .map(|(_, top, row)| Target {
                row: *row,
                token: 0,
                top: top.unwrap_or(0).max(1),
            })
            .collect();
        let scored = computed(care, || score_rows(&self.decoder, hidden, &targets))?;
        for ((id, top, _), scored) in likeliest.into_iter().zip(scored) {
            let (token, logprob) = scored.top[0];
            let drawn = match logprob > NO_LOGPROB {
                false => Drawn::failed("the model gave no finite logit".to_owned(), None),
                true => Drawn {
                    token: Ok(token),
                    logprobs: top.map(|top| {
                        TokenLogprobs {
                            token,
                            logprob,
                            ..scored
                        }
                        .with_top(top)
                    }),
                },
            };
            self.take(id, drawn);
        }
        Ok(())
    }

    /// Draws for the sequences of which nothing but the logits counts, where the logits lie.
    #[cfg(feature = "cuda")]
    fn draw_there(
        &mut self,
        rows: &mut Vec<(u64, u32)>,
        hidden: &Tensor,
        care: &mut dyn DeviceCare,
    ) -> Result<(), LmError> {
        if !self.decoder.summarizes() {
            return Ok(());
        }
        let mut drawing = Vec::new();
        for (id, row) in &*rows {
            let sequence = self.sequences.get_mut(id);
            if let Some((chance, top)) = sequence.and_then(Sequence::chance) {
                drawing.push((*id, *row, chance, top));
            }
        }
        let places: Vec<u32> = drawing.iter().map(|(_, row, ..)| *row).collect();
        let chances: Vec<_> = drawing.iter().map(|(_, _, chance, _)| *chance).collect();
        if drawing.is_empty() {
            return Ok(());
        }
        let tokens = computed(care, || self.decoder.draw(hidden, &places, &chances))?;
        let drawn: Vec<_> = drawing
            .into_iter()
            .zip(tokens)
            .filter_map(|((id, row, _, top), token)| Some((id, row, token?, top)))
            .collect();
        let targets: Vec<Target> = drawn
            .iter()
            .filter_map(|(_, row, token, top)| {
                Some(Target {
                    row: *row,
                    token: *token,
                    top: (*top)?,
                })
            })
            .collect();
        let mut scored = computed(care, || score_rows(&self.decoder, hidden, &targets))?.into_iter();
        for (id, _, token, top) in drawn {
            rows.retain(|(other, _)| *other != id);
            if let Some(sequence) = self.sequences.get_mut(&id) {
                sequence.sampler.drawn();
            }
            let drawn = Drawn {
                token: Ok(token),
                logprobs: top.and_then(|_| scored.next()),
            };
            self.take(id, drawn);
        }
        Ok(())
    }
}

impl Sequence {
    /// Whether its next token is the likeliest one, whatever the answer has; and how many logprobs are wanted.
    fn takes_likeliest(&self) -> Option<Option<usize>> {
        let request = &self.request;
        let plain = request.sampling.takes_likeliest()
            && request.logit_bias.is_empty()
            && request.constraint.is_none()
            && self.answered >= request.min_tokens;
        plain.then_some(request.logprobs)
    }

    /// What its next token is drawn by, if that and the logits are all that counts; and how many logprobs are wanted.
    #[cfg(feature = "cuda")]
    fn chance(&mut self) -> Option<(Chance, Option<usize>)> {
        let request = &self.request;
        let plain = request.logit_bias.is_empty()
            && request.constraint.is_none()
            && self.answered >= request.min_tokens;
        let chance = if plain { self.sampler.chance() } else { None };
        Some((chance?, request.logprobs))
    }

    fn draw(&mut self, mut logits: Vec<f32>) -> Drawn {
        let unchanged = self.request.logprobs.map(|top| (top, logits.clone()));
        for (token, bias) in &self.request.logit_bias {
            if let Some(logit) = logits.get_mut(*token as usize) {
                *logit += bias;
            }
        }
        let banned: &[u32] = match self.answered < self.request.min_tokens {
            true => &self.request.stop_ids,
            false => &[],
        };
        if let Some(constraint) = &mut self.request.constraint
            && let Err(error) = constraint.apply(&mut logits)
        {
            return Drawn::failed(error, Some("response_format"));
        }
        let Some(token) = self.sampler.sample(&mut logits, banned) else {
            return Drawn::failed("the model gave no finite logit".to_owned(), None);
        };
        if let Some(constraint) = &mut self.request.constraint
            && !self.request.stop_ids.contains(&token)
            && let Err(error) = constraint.accept(token)
        {
            return Drawn::failed(error, Some("response_format"));
        }
        // Log-probabilities are those of the model, before penalties and temperature.
        let logprobs = unchanged.map(|(top, logits)| score_logits(&logits, token, top));
        Drawn {
            token: Ok(token),
            logprobs,
        }
    }
}
