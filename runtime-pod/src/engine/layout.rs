//! Where a model's weights lie in its files: names, and the rows of stored tensors that make up each matrix.
//!
//! Query, key and value are one matrix here, and so are gate and up: fewer and larger products. A file may have them apart, joined
//! one below the other, or joined head by head; each is a list of [`Part`]s.

use std::collections::BTreeSet;

use super::config::{ModelConfig, NormKind, Residual};

/// Rows of a matrix, or values of a vector, as one stored tensor has them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// The tensor's name.
    pub name: String,
    /// Rows that are taken.
    pub rows: usize,
    /// Rows of the whole tensor.
    pub stored: usize,
    /// The tensor lies in the file with rows and columns changed over; never a vector.
    pub transposed: bool,
    /// Stored row of the first one taken.
    first: usize,
    /// Rows that follow each other in the tensor; divides `rows`.
    run: usize,
    /// From the begin of one run to that of the next.
    stride: usize,
}

impl Part {
    /// A tensor of `rows` rows, as it is.
    pub fn whole(name: impl Into<String>, rows: usize) -> Self {
        Self { name: name.into(), rows, stored: rows, transposed: false, first: 0, run: rows, stride: rows }
    }

    /// One of `of` equal shares of every group of rows: each of `groups` groups holds `run` rows of the first share, then as
    /// many of the second, and so on. This is share `which`, counted from 0.
    pub fn share(name: impl Into<String>, which: usize, of: usize, run: usize, groups: usize) -> Self {
        let rows = run * groups;
        Self {
            name: name.into(),
            rows,
            stored: of * rows,
            transposed: false,
            first: which * run,
            run,
            stride: of * run,
        }
    }

    /// The runs of neighbouring rows in the tensor that it consists of: first row and number.
    pub fn runs(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        (0..self.rows / self.run).map(|i| (self.first + i * self.stride, self.run))
    }

    /// Row of the tensor that row `row` is.
    pub fn row(&self, row: usize) -> usize {
        self.first + row / self.run * self.stride + row % self.run
    }
}

/// A matrix and its bias.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinearLayout {
    /// Parts of the matrix, one below the other.
    pub weight: Vec<Part>,
    /// Parts of the bias, as many values as the matrix has rows.
    pub bias: Option<Vec<Part>>,
    /// Width of each row.
    pub columns: usize,
}

impl LinearLayout {
    /// The tensor `name.weight` of `rows` rows, and with `bias` also `name.bias`.
    pub fn one(name: &str, rows: usize, columns: usize, bias: bool) -> Self {
        Self::of(vec![Part::whole(name, rows)], columns, bias)
    }

    /// The same of several parts, one below the other, whose names lack `.weight` and `.bias`.
    pub fn of(parts: Vec<Part>, columns: usize, bias: bool) -> Self {
        let named = |suffix: &str, transposed: bool| -> Vec<Part> {
            let name = |part: &Part| format!("{}.{suffix}", part.name);
            parts.iter().map(|p| Part { name: name(p), transposed: transposed && p.transposed, ..p.clone() }).collect()
        };
        Self { weight: named("weight", true), bias: bias.then(|| named("bias", false)), columns }
    }

    /// The same with the matrix stored as (columns, rows).
    pub fn transposed(mut self) -> Self {
        self.weight.iter_mut().for_each(|part| part.transposed = true);
        self
    }

    /// Rows of the matrix.
    pub fn rows(&self) -> usize {
        self.weight.iter().map(|part| part.rows).sum()
    }
}

/// Weights of a norm, and its biases where it has some.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NormLayout {
    /// The weights.
    pub weight: Part,
    /// The biases.
    pub bias: Option<Part>,
}

impl NormLayout {
    /// The norm `name` of rows as wide as the residual stream of `config`.
    pub fn new(name: &str, config: &ModelConfig) -> Self {
        let part = |suffix: &str| Part::whole(format!("{name}.{suffix}"), config.hidden);
        Self { weight: part("weight"), bias: (config.norm == NormKind::Layer).then(|| part("bias")) }
    }
}

/// One transformer block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockLayout {
    /// Norm in front of the attention.
    pub attention_norm: NormLayout,
    /// Query, key and value, one below the other.
    pub qkv: LinearLayout,
    /// Weights of the norms of each head's query and key.
    pub head_norms: Option<(Part, Part)>,
    /// The attention's output.
    pub o: LinearLayout,
    /// Norm in front of the MLP; none where it reads what the attention reads.
    pub mlp_norm: Option<NormLayout>,
    /// The MLP's first product: where it is gated the gate, then the other half below it.
    pub up: LinearLayout,
    /// The MLP's second product.
    pub down: LinearLayout,
}

/// A tensor as a file has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// Its name.
    pub name: String,
    /// Its dimensions, the outermost first.
    pub shape: Vec<usize>,
    /// It holds the weights of a norm.
    pub norm: bool,
}

/// Where all weights of a model are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// The embedding; never with a bias.
    pub embedding: LinearLayout,
    /// The table of learned positions.
    pub positions: Option<LinearLayout>,
    /// Norm of the embedding.
    pub embedding_norm: Option<NormLayout>,
    /// The blocks in their order.
    pub blocks: Vec<BlockLayout>,
    /// Norm in front of the output layer.
    pub final_norm: NormLayout,
    /// The output layer. Where the configuration ties it to the embedding its matrix is the embedding's, and only its bias, if any,
    /// is its own.
    pub output: LinearLayout,
    /// Tensors that a file may hold though nobody reads them.
    pub ignored: Vec<String>,
}

impl Layout {
    /// The matrix whose type is a file's type: most are like it.
    pub fn typical(&self) -> &Part {
        &self.blocks.first().map_or(&self.embedding, |block| &block.down).weight[0]
    }

    /// Embedding and final norm of names that begin with `body`, an output layer, and nothing between them.
    pub(super) fn ends(body: &str, [embedding, final_norm]: [&str; 2], output: &str, config: &ModelConfig) -> Self {
        let &ModelConfig { vocab, hidden, tied, .. } = config;
        let embedding = LinearLayout::one(&format!("{body}{embedding}"), vocab, hidden, false);
        let mut output = LinearLayout::one(output, vocab, hidden, config.biases.output);
        let mut ignored = Vec::new();
        if tied {
            // transformers ties them too, whatever the file holds.
            ignored.extend(output.weight.iter().map(|part| part.name.clone()));
            output.weight.clone_from(&embedding.weight);
        }
        Self {
            embedding,
            output,
            ignored,
            positions: None,
            embedding_norm: None,
            blocks: Vec::new(),
            final_norm: NormLayout::new(&format!("{body}{final_norm}"), config),
        }
    }

    /// All tensors, each once, from the embedding through the blocks to the output layer.
    pub fn tensors(&self) -> Vec<Stored> {
        let mut all = Tensors::default();
        all.linear(&self.embedding);
        self.positions.iter().for_each(|table| all.linear(table));
        self.embedding_norm.iter().for_each(|norm| all.norm(norm));
        for block in &self.blocks {
            all.norm(&block.attention_norm);
            all.linear(&block.qkv);
            block.head_norms.iter().for_each(|(query, key)| all.head_norms([query, key]));
            all.linear(&block.o);
            block.mlp_norm.iter().for_each(|norm| all.norm(norm));
            all.linear(&block.up);
            all.linear(&block.down);
        }
        all.norm(&self.final_norm);
        all.linear(&self.output);
        all.stored
    }

    /// What the names of the model's tensors begin with, up to the first dot. A tensor of such a name that nothing reads says that
    /// the configuration is another model's.
    pub fn roots(&self) -> BTreeSet<String> {
        let names = self.tensors().into_iter().map(|tensor| tensor.name).chain(self.ignored.iter().cloned());
        names.filter_map(|name| name.split('.').next().map(str::to_owned)).collect()
    }
}

/// Collects tensors, of several parts of one tensor the first.
#[derive(Default)]
struct Tensors {
    names: BTreeSet<String>,
    stored: Vec<Stored>,
}

impl Tensors {
    fn add(&mut self, part: &Part, columns: Option<usize>, norm: bool) {
        if self.names.insert(part.name.clone()) {
            let mut shape: Vec<usize> = [part.stored].into_iter().chain(columns).collect();
            if part.transposed {
                shape.reverse();
            }
            self.stored.push(Stored { name: part.name.clone(), shape, norm });
        }
    }

    /// Each part's weights, and its biases behind them.
    fn linear(&mut self, linear: &LinearLayout) {
        for (i, weight) in linear.weight.iter().enumerate() {
            self.add(weight, Some(linear.columns), false);
            if let Some(bias) = &linear.bias {
                self.add(&bias[i], None, false);
            }
        }
    }

    fn norm(&mut self, norm: &NormLayout) {
        self.add(&norm.weight, None, true);
        norm.bias.iter().for_each(|bias| self.add(bias, None, false));
    }

    fn head_norms(&mut self, norms: [&Part; 2]) {
        norms.into_iter().for_each(|norm| self.add(norm, None, true));
    }
}

/// The norm in front of an MLP, where a model has one.
pub(super) fn mlp_norm(name: &str, config: &ModelConfig) -> Option<NormLayout> {
    (config.residual != Residual::ParallelOneNorm).then(|| NormLayout::new(name, config))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_takes_its_rows_of_every_group() {
        // Two heads of three values, query, key and value joined head by head: the keys.
        let keys = Part::share("joined", 1, 3, 3, 2);
        assert_eq!((keys.rows, keys.stored), (6, 18));
        assert_eq!(keys.runs().collect::<Vec<_>>(), [(3, 3), (12, 3)]);
        assert_eq!((0..6).map(|row| keys.row(row)).collect::<Vec<_>>(), [3, 4, 5, 12, 13, 14]);
        let whole = Part::whole("whole", 4);
        assert_eq!(whole.runs().collect::<Vec<_>>(), [(0, 4)]);
        assert_eq!((0..4).map(|row| whole.row(row)).collect::<Vec<_>>(), [0, 1, 2, 3]);
    }

    #[test]
    fn biases_lie_as_their_matrices_but_are_never_transposed() {
        let linear = LinearLayout::one("c_fc", 8, 2, true).transposed();
        assert_eq!(
            (linear.weight[0].name.as_str(), linear.weight[0].transposed, linear.rows()),
            ("c_fc.weight", true, 8)
        );
        let bias = &linear.bias.unwrap()[0];
        assert_eq!((bias.name.as_str(), bias.transposed, bias.rows), ("c_fc.bias", false, 8));
    }
}
