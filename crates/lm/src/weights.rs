//! Where a decoder's weights come from: an opened checkpoint, or one with an adapter folded in. Checks every
//! shape against the config before a byte of the tensor is read.

use std::borrow::Cow;
use std::cell::RefCell;

#[cfg(feature = "cuda")]
use candle_core::Device;
use candle_core::Tensor;
use cauldron_checkpoint::{Checkpoint, Dtype, Expert};

use crate::arithmetic::Placement;
use crate::ops::Matrix;
use crate::{LmError, ModelConfig};

/// Named float tensors.
pub trait WeightSource: Sync {
    /// Shape of a tensor, or None if there is none of that name.
    fn shape(&self, name: &str) -> Option<Vec<usize>>;
    /// The whole tensor, row-major, widened to f32.
    fn read_f32(&self, name: &str) -> Result<Vec<f32>, LmError>;
    /// Appends the little-endian bytes of a tensor that is bf16; false if it is something else, and then nothing is appended.
    fn read_bf16(&self, _name: &str, _out: &mut Vec<u8>) -> Result<bool, LmError> {
        Ok(false)
    }

    /// The same bytes where they lie in memory, in their order; None where they do not, or are something else.
    fn bf16_pieces(&self, _name: &str) -> Option<Vec<&[u8]>> {
        None
    }

    /// The whole tensor, in its shape, where it lies on the decoder's GPU; None where it does not.
    #[cfg(feature = "cuda")]
    fn on_gpu(&self, _name: &str) -> Result<Option<Tensor>, LmError> {
        Ok(None)
    }
}

impl WeightSource for Checkpoint {
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.get(name).map(|info| info.shape.clone())
    }

    fn read_f32(&self, name: &str) -> Result<Vec<f32>, LmError> {
        Ok(Checkpoint::read_f32(self, name)?)
    }

    fn read_bf16(&self, name: &str, out: &mut Vec<u8>) -> Result<bool, LmError> {
        let Some(info) = self.get(name).filter(|info| info.dtype == Dtype::BF16) else {
            return Ok(false);
        };
        let start = out.len();
        out.resize(start + info.byte_len() as usize, 0);
        self.read_into(name, 0, &mut out[start..])?;
        Ok(true)
    }
}

impl WeightSource for Expert {
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.checkpoint().get(name).map(|info| info.shape.clone())
    }

    fn read_f32(&self, name: &str) -> Result<Vec<f32>, LmError> {
        Ok(Expert::read_f32(self, name)?)
    }
}

/// Names and shapes of all tensors that a model of this config has.
pub(crate) fn expected_tensors(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let hidden = config.hidden_size;
    let queries = config.num_heads * config.head_dim;
    let keys = config.num_kv_heads * config.head_dim;
    let mlp = config.intermediate_size;
    let projections: &[_] = match config.fused_projections {
        true => &[
            ("self_attn.qkv_proj", queries + 2 * keys, hidden, config.qkv_bias),
            ("mlp.gate_up_proj", 2 * mlp, hidden, config.mlp_bias),
        ],
        false => &[
            ("self_attn.q_proj", queries, hidden, config.qkv_bias),
            ("self_attn.k_proj", keys, hidden, config.qkv_bias),
            ("self_attn.v_proj", keys, hidden, config.qkv_bias),
            ("mlp.gate_proj", mlp, hidden, config.mlp_bias),
            ("mlp.up_proj", mlp, hidden, config.mlp_bias),
        ],
    };
    let outputs = [
        ("self_attn.o_proj", hidden, queries, config.o_bias),
        ("mlp.down_proj", hidden, mlp, config.mlp_bias),
    ];
    let mut tensors = vec![
        (
            "model.embed_tokens.weight".to_owned(),
            vec![config.vocab_size, hidden],
        ),
        ("model.norm.weight".to_owned(), vec![hidden]),
    ];
    if !config.tie_word_embeddings {
        tensors.push(("lm_head.weight".to_owned(), vec![config.vocab_size, hidden]));
    }
    for layer in 0..config.num_layers {
        let mut add =
            |part: &str, shape: Vec<usize>| tensors.push((format!("model.layers.{layer}.{part}"), shape));
        add("input_layernorm.weight", vec![hidden]);
        add("post_attention_layernorm.weight", vec![hidden]);
        if config.gemma_block {
            add("pre_feedforward_layernorm.weight", vec![hidden]);
            add("post_feedforward_layernorm.weight", vec![hidden]);
        }
        if config.qk_norm {
            add("self_attn.q_norm.weight", vec![config.head_dim]);
            add("self_attn.k_norm.weight", vec![config.head_dim]);
        }
        for (part, rows, columns, bias) in projections.iter().chain(&outputs) {
            add(&format!("{part}.weight"), vec![*rows, *columns]);
            if *bias {
                add(&format!("{part}.bias"), vec![*rows]);
            }
        }
    }
    tensors
}

/// Reads checked tensors of a source onto a device.
pub(crate) struct Loader<'a> {
    pub source: &'a dyn WeightSource,
    pub placement: Placement<'a>,
    spare: RefCell<Vec<u8>>,
}

impl<'a> Loader<'a> {
    pub(crate) fn new(source: &'a dyn WeightSource, placement: Placement<'a>) -> Self {
        Self {
            source,
            placement,
            spare: RefCell::default(),
        }
    }

    /// What an RMS norm multiplies by: Gemma keeps it less one.
    pub(crate) fn norm(&self, name: &str, len: usize, config: &ModelConfig) -> Result<Tensor, LmError> {
        let mut values = self.read(name, &[len])?;
        if config.gemma_block {
            values.iter_mut().for_each(|value| *value += 1.0);
        }
        Ok(Tensor::from_vec(values, len, self.placement.device)?)
    }

    /// Matrices of `columns` columns stacked into one \[sum of rows, columns\].
    pub(crate) fn stacked(&self, parts: &[(String, usize)], columns: usize) -> Result<Matrix, LmError> {
        #[cfg(feature = "cuda")]
        if let Some(matrix) = self.stacked_on_gpu(parts, columns)? {
            return Ok(matrix);
        }
        if let Some(matrix) = self.stacked_bf16(parts, columns)? {
            return Ok(matrix);
        }
        let mut values = Vec::new();
        for (name, rows) in parts {
            let mut part = self.read(name, &[*rows, columns])?;
            match values.is_empty() {
                true => values = part,
                false => values.append(&mut part),
            }
        }
        Ok(Matrix::new(values, columns, self.placement)?)
    }

    /// Without a detour over the CPU's memory, where all parts lie on the GPU already.
    #[cfg(feature = "cuda")]
    fn stacked_on_gpu(&self, parts: &[(String, usize)], columns: usize) -> Result<Option<Matrix>, LmError> {
        if matches!(self.placement.device, Device::Cpu) {
            return Ok(None);
        }
        let mut tensors = Vec::new();
        for (name, rows) in parts {
            check_shape(self.source, name, &[*rows, columns])?;
            match self.source.on_gpu(name)? {
                Some(tensor) if tensor.dims() == [*rows, columns] => tensors.push(tensor),
                Some(_) => return Err(unfilled(name)),
                None => return Ok(None),
            }
        }
        Ok(Some(Matrix::of_gpu(&tensors, self.placement)?))
    }

    /// Without a detour over f32, where all parts are bf16 and stay so.
    fn stacked_bf16(&self, parts: &[(String, usize)], columns: usize) -> Result<Option<Matrix>, LmError> {
        if !self.placement.keeps_bf16() {
            return Ok(None);
        }
        for (name, rows) in parts {
            check_shape(self.source, name, &[*rows, columns])?;
        }
        let row_bytes = 2 * columns;
        let pieces: Option<Vec<_>> = parts
            .iter()
            .map(|(name, _)| self.source.bf16_pieces(name))
            .collect();
        if let Some(pieces) = pieces {
            let mut rows = Vec::new();
            for ((name, count), pieces) in parts.iter().zip(pieces) {
                let before = rows.len();
                rows_of(&pieces, row_bytes, &mut rows);
                if rows.len() - before != *count || rows.iter().any(|row| row.len() != row_bytes) {
                    return Err(unfilled(name));
                }
            }
            return Ok(Some(Matrix::of_bf16(&rows, columns)));
        }
        // Memory that was touched before is cheaper than new one.
        let mut bytes = self.spare.take();
        bytes.clear();
        let mut are_bf16 = true;
        for (name, rows) in parts {
            let start = bytes.len();
            are_bf16 = self.source.read_bf16(name, &mut bytes)?;
            if !are_bf16 {
                break;
            }
            if bytes.len() - start != rows * row_bytes {
                return Err(unfilled(name));
            }
        }
        let matrix = are_bf16.then(|| {
            let rows: Vec<Cow<'_, [u8]>> = bytes.chunks_exact(row_bytes).map(Cow::Borrowed).collect();
            Matrix::of_bf16(&rows, columns)
        });
        self.spare.replace(bytes);
        Ok(matrix)
    }

    /// Vectors joined end to end.
    pub(crate) fn joined(&self, parts: &[(String, usize)]) -> Result<Tensor, LmError> {
        let mut values = Vec::new();
        for (name, len) in parts {
            values.append(&mut self.read(name, &[*len])?);
        }
        let len = values.len();
        Ok(Tensor::from_vec(values, len, self.placement.device)?)
    }

    fn read(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, LmError> {
        check_shape(self.source, name, shape)?;
        let values = self.source.read_f32(name)?;
        if values.len() != shape.iter().product::<usize>() {
            return Err(unfilled(name));
        }
        Ok(values)
    }
}

/// Rows of what lies in pieces: where it lies, but for rows that two pieces share. A last row may be short.
fn rows_of<'a>(pieces: &[&'a [u8]], row_bytes: usize, rows: &mut Vec<Cow<'a, [u8]>>) {
    let mut begun: Vec<u8> = Vec::new();
    for piece in pieces {
        let mut piece = *piece;
        if !begun.is_empty() {
            let (end, rest) = piece.split_at(piece.len().min(row_bytes - begun.len()));
            begun.extend_from_slice(end);
            piece = rest;
            if begun.len() < row_bytes {
                continue;
            }
            rows.push(Cow::Owned(std::mem::take(&mut begun)));
        }
        let whole = piece.chunks_exact(row_bytes);
        begun.extend_from_slice(whole.remainder());
        rows.extend(whole.map(Cow::Borrowed));
    }
    if !begun.is_empty() {
        rows.push(Cow::Owned(begun));
    }
}

fn unfilled(name: &str) -> LmError {
    LmError::Tensor {
        tensor: name.to_owned(),
        detail: "its bytes do not fill its shape".into(),
    }
}

/// Checks presence and shape without reading.
pub(crate) fn check_shape(source: &dyn WeightSource, name: &str, shape: &[usize]) -> Result<(), LmError> {
    let bad = |detail: String| LmError::Tensor {
        tensor: name.to_owned(),
        detail,
    };
    match source.shape(name) {
        None => Err(bad("is missing".into())),
        Some(found) if found != shape => Err(bad(format!("is {found:?}; config.json says {shape:?}"))),
        Some(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_found_wherever_pieces_are_cut() {
        let bytes: Vec<u8> = (0..60).collect();
        let whole: Vec<&[u8]> = bytes.chunks(6).collect();
        for cuts in [vec![], vec![6], vec![1], vec![5, 7], vec![2, 3, 4, 20, 24, 59]] {
            let mut pieces = Vec::new();
            let mut start = 0;
            for end in cuts.iter().copied().chain([60]) {
                pieces.push(&bytes[start..end]);
                start = end;
            }
            let mut rows = Vec::new();
            rows_of(&pieces, 6, &mut rows);
            assert_eq!(rows, whole, "{cuts:?}");
        }
        let mut rows = Vec::new();
        rows_of(&[&bytes[..8]], 6, &mut rows);
        assert_eq!(rows.last().map(|row| row.len()), Some(2));
    }
}
