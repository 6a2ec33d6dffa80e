//! From what a model did with each item to numbers with standard errors.

use serde::{Deserialize, Serialize};

use super::task::{Answer, Item, Kind, Match, Task};

/// What a model did with one item.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    Generated {
        text: String,
        right: bool,
    },
    /// By choice: log-probability and bytes.
    Chosen {
        logprobs: Vec<f64>,
        bytes: Vec<usize>,
        right: usize,
    },
    Scored {
        logprob: f64,
        tokens: usize,
        bytes: usize,
        greedy: bool,
    },
}

/// A number of a task.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Metric {
    pub value: f64,
    /// None where there are too few items to tell.
    pub stderr: Option<f64>,
    pub items: usize,
}

/// Whether more is better, by the names of our metrics and lm-eval's.
pub fn is_better_higher(metric: &str) -> bool {
    !["brier", "perplexity", "bits_per_byte"]
        .iter()
        .any(|less| metric.contains(less))
}

/// The metrics of a kind of task, the first one being its default.
pub fn names(kind: Kind, matching: &Match) -> Vec<&'static str> {
    match kind {
        Kind::Generate => vec![matching.name()],
        Kind::Choice => vec!["acc", "acc_norm", "mcc", "brier"],
        Kind::Loglikelihood => vec!["perplexity", "loglikelihood", "greedy"],
        Kind::Imported => Vec::new(),
    }
}

/// Whether a generated answer is right.
pub fn is_right(task: &Task, item: &Item, text: &str) -> bool {
    let Answer::Texts(right) = &item.answer else {
        return false;
    };
    let text = text.trim();
    match &task.matching {
        Match::Exact => right.iter().any(|right| right.trim() == text),
        Match::Contains => right.iter().any(|right| text.contains(right.trim())),
        Match::Numeric => {
            let found = last_number(text);
            let close = |a: f64, b: f64| (a - b).abs() <= 1e-9 * a.abs().max(b.abs()).max(1.0);
            let right = right.iter().filter_map(|right| last_number(right));
            found.is_some_and(|found| right.into_iter().any(|right| close(found, right)))
        }
        Match::Regex(pattern) => {
            let found = pattern
                .captures(text)
                .and_then(|found| found.get(1).or(found.get(0)));
            found.is_some_and(|found| right.iter().any(|right| right.trim() == found.as_str().trim()))
        }
    }
}

/// Whether an answer that begins so can still be right, for [`Match::Exact`].
pub fn may_be_right(item: &Item, begun: &str) -> bool {
    let Answer::Texts(right) = &item.answer else {
        return true;
    };
    let begun = begun.trim_start();
    right
        .iter()
        .map(|right| right.trim())
        .any(|right| right.starts_with(begun) || right == begun.trim_end())
}

/// `1,234.5` and `-3` are numbers; what follows a digit as in `x2` too.
fn last_number(text: &str) -> Option<f64> {
    let bytes = text.as_bytes();
    let end = bytes.iter().rposition(u8::is_ascii_digit)? + 1;
    let is_part = |at: usize| {
        let between = |of: u8| bytes[at] == of && at > 0 && bytes[at - 1].is_ascii_digit();
        bytes[at].is_ascii_digit() || between(b'.') || between(b',')
    };
    let mut start = end - 1;
    while start > 0 && is_part(start - 1) {
        start -= 1;
    }
    // A minus belongs to the number unless it stands between two.
    let minus = start > 0 && bytes[start - 1] == b'-';
    let between = start > 1 && (bytes[start - 2].is_ascii_alphanumeric() || bytes[start - 2] == b')');
    let digits: String = text[start..end].chars().filter(|c| *c != ',').collect();
    let number: f64 = digits.parse().ok()?;
    Some(if minus && !between { -number } else { number })
}

/// A metric over some items.
pub fn measure(metric: &str, outcomes: &[&Outcome]) -> Option<Metric> {
    match metric {
        "mcc" => jackknife(outcomes, &mcc),
        "perplexity" => jackknife(outcomes, &perplexity),
        _ => {
            let values: Option<Vec<f64>> = outcomes.iter().map(|outcome| value(metric, outcome)).collect();
            mean(&values?)
        }
    }
}

/// The performance drop rate under an attack, (metric - metric under attack) / metric (arXiv 2502.15434, section 4; PromptBench's
/// PDR), over the same items in both; its error is that of the jackknife over items. None where the metric is 0 without the attack.
pub fn drop_rate(metric: &str, plain: &[&Outcome], attacked: &[&Outcome]) -> Option<Metric> {
    let statistic: &dyn Fn(&Totals) -> f64 = match metric {
        "mcc" => &mcc,
        "perplexity" => &perplexity,
        // The counts are the same: sums do as well as means.
        _ => &|totals| totals.sum,
    };
    let add = |totals: &mut Totals, outcome: &Outcome, sign: f64| match metric {
        "mcc" | "perplexity" => totals.add(outcome, sign),
        _ => value(metric, outcome).map(|value| totals.sum += sign * value),
    };
    let (mut before, mut after) = (Totals::default(), Totals::default());
    for (a, b) in plain.iter().zip(attacked) {
        add(&mut before, a, 1.0)?;
        add(&mut after, b, 1.0)?;
    }
    let rate = |before: &Totals, after: &Totals| {
        let unattacked = statistic(before);
        Some(1.0 - statistic(after) / unattacked).filter(|_| unattacked.abs() > 1e-9)
    };
    let value = rate(&before, &after)?;
    let mut without = Vec::with_capacity(plain.len());
    for (a, b) in plain.iter().zip(attacked) {
        add(&mut before, a, -1.0)?;
        add(&mut after, b, -1.0)?;
        without.push(rate(&before, &after));
        add(&mut before, a, 1.0)?;
        add(&mut after, b, 1.0)?;
    }
    let without: Option<Vec<f64>> = without.into_iter().collect();
    Some(Metric {
        value,
        stderr: without.as_deref().and_then(spread),
        items: plain.len(),
    })
}

/// What an item counts for a metric that is a mean.
pub fn value(metric: &str, outcome: &Outcome) -> Option<f64> {
    let yes = |yes: bool| f64::from(u8::from(yes));
    match (metric, outcome) {
        ("exact" | "numeric" | "contains" | "regex", Outcome::Generated { right, .. }) => Some(yes(*right)),
        ("acc", Outcome::Chosen { logprobs, right, .. }) => Some(yes(first_largest(logprobs) == *right)),
        (
            "acc_norm",
            Outcome::Chosen {
                logprobs,
                bytes,
                right,
            },
        ) => {
            let by_byte: Vec<f64> = logprobs
                .iter()
                .zip(bytes)
                .map(|(l, b)| l / (*b).max(1) as f64)
                .collect();
            Some(yes(first_largest(&by_byte) == *right))
        }
        ("brier", Outcome::Chosen { logprobs, right, .. }) => {
            let shares = softmax(logprobs).into_iter().enumerate();
            Some(shares.map(|(k, p)| (p - yes(k == *right)).powi(2)).sum())
        }
        ("loglikelihood", Outcome::Scored { logprob, .. }) => Some(*logprob),
        ("greedy", Outcome::Scored { greedy, .. }) => Some(yes(*greedy)),
        _ => None,
    }
}

fn first_largest(values: &[f64]) -> usize {
    (1..values.len()).fold(
        0,
        |best, index| if values[index] > values[best] { index } else { best },
    )
}

fn softmax(logprobs: &[f64]) -> Vec<f64> {
    let largest = logprobs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = logprobs.iter().map(|l| (l - largest).exp()).collect();
    let sum: f64 = weights.iter().sum();
    weights.iter().map(|w| w / sum).collect()
}

/// Mean and the standard error of it: the sample's deviation over the root of its size, as in lm-eval.
pub fn mean(values: &[f64]) -> Option<Metric> {
    let n = values.len() as f64;
    if values.is_empty() {
        return None;
    }
    let mean = values.iter().sum::<f64>() / n;
    let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
    Some(Metric {
        value: mean,
        stderr: (values.len() > 1).then(|| (squares / (n - 1.0) / n).sqrt()),
        items: values.len(),
    })
}

/// A statistic that is no mean, with the error that leaving out each item in turn shows.
fn jackknife(outcomes: &[&Outcome], statistic: &dyn Fn(&Totals) -> f64) -> Option<Metric> {
    let mut totals = Totals::default();
    for outcome in outcomes {
        totals.add(outcome, 1.0)?;
    }
    if outcomes.is_empty() {
        return None;
    }
    let value = statistic(&totals);
    let mut without = Vec::with_capacity(outcomes.len());
    for outcome in outcomes {
        totals.add(outcome, -1.0)?;
        without.push(statistic(&totals));
        totals.add(outcome, 1.0)?;
    }
    Some(Metric {
        value,
        stderr: spread(&without),
        items: outcomes.len(),
    })
}

/// The jackknife's standard error, from what is found without each item.
fn spread(without: &[f64]) -> Option<f64> {
    let n = without.len() as f64;
    let middle = without.iter().sum::<f64>() / n;
    let squares: f64 = without.iter().map(|v| (v - middle).powi(2)).sum();
    (without.len() > 1).then(|| ((n - 1.0) / n * squares).sqrt())
}

/// Sums that the statistics are made of.
#[derive(Debug, Default)]
struct Totals {
    /// By right choice, by the model's choice.
    confusion: Vec<Vec<f64>>,
    logprob: f64,
    tokens: f64,
    /// Of a metric that is a mean.
    sum: f64,
}

impl Totals {
    fn add(&mut self, outcome: &Outcome, sign: f64) -> Option<()> {
        match outcome {
            Outcome::Chosen { logprobs, right, .. } => {
                let size = self.confusion.len().max(logprobs.len());
                self.confusion.resize_with(size, Vec::new);
                self.confusion.iter_mut().for_each(|row| row.resize(size, 0.0));
                self.confusion[*right][first_largest(logprobs)] += sign;
            }
            Outcome::Scored { logprob, tokens, .. } => {
                self.logprob += sign * logprob;
                self.tokens += sign * *tokens as f64;
            }
            Outcome::Generated { .. } => return None,
        }
        Some(())
    }
}

fn perplexity(totals: &Totals) -> f64 {
    (-totals.logprob / totals.tokens.max(1.0)).exp()
}

/// Matthews correlation of several classes (Gorodkin's R_K); 0 where it is not defined, as in scikit-learn.
fn mcc(totals: &Totals) -> f64 {
    let table = &totals.confusion;
    let size = table.len();
    let all: f64 = table.iter().flatten().sum();
    let right: f64 = (0..size).map(|k| table[k][k]).sum();
    let rows: Vec<f64> = table.iter().map(|row| row.iter().sum()).collect();
    let columns: Vec<f64> = (0..size).map(|k| table.iter().map(|row| row[k]).sum()).collect();
    let both: f64 = rows.iter().zip(&columns).map(|(a, b)| a * b).sum();
    let squares = |sums: &[f64]| all * all - sums.iter().map(|s| s * s).sum::<f64>();
    let below = (squares(&rows) * squares(&columns)).sqrt();
    match below > 0.0 {
        true => (right * all - both) / below,
        false => 0.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(logprobs: &[f64], right: usize) -> Outcome {
        Outcome::Chosen {
            logprobs: logprobs.to_vec(),
            bytes: vec![2, 4],
            right,
        }
    }

    #[test]
    fn an_answer_is_given_up_where_it_cannot_be_right() {
        let item = Item {
            prompt: String::new(),
            answer: Answer::Texts(vec![" 1+2=3".to_owned(), "three".to_owned()]),
            unattacked: None,
        };
        for begun in ["", " ", " 1", "1+2", " 1+2=3", "1+2=3 \n", "th", "three"] {
            assert!(may_be_right(&item, begun), "{begun}");
        }
        for begun in ["2", " 1 +", "1+2=3.", "threes", "1+2=3 4"] {
            assert!(!may_be_right(&item, begun), "{begun}");
        }
    }

    #[test]
    fn the_last_number_is_found() {
        for (text, number) in [
            ("18+12=30, 30-2=28", Some(28.0)),
            ("it is -3", Some(-3.0)),
            ("1,234.50 or so", Some(1234.5)),
            ("5-3", Some(3.0)),
            ("the end.", None),
            ("x2", Some(2.0)),
            ("", None),
            ("$7.", Some(7.0)),
        ] {
            assert_eq!(last_number(text), number, "{text}");
        }
    }

    #[test]
    fn means_have_the_error_of_lm_eval() {
        let metric = mean(&[1.0, 0.0, 0.0, 1.0, 1.0]).expect("a metric");
        assert!((metric.value - 0.6).abs() < 1e-12);
        // sample_stddev / sqrt(n)
        assert!((metric.stderr.expect("an error") - (0.3f64 / 5.0).sqrt()).abs() < 1e-12);
        assert_eq!(mean(&[2.0]).expect("a metric").stderr, None);
        assert_eq!(mean(&[]), None);
    }

    #[test]
    fn choices_are_counted_as_their_definitions_say() {
        let outcomes = [
            chosen(&[-1.0, -2.0], 0),
            chosen(&[-1.0, -1.5], 1),
            chosen(&[-3.0, -1.0], 1),
            chosen(&[-3.0, -1.0], 0),
        ];
        let all: Vec<&Outcome> = outcomes.iter().collect();
        let of = |metric: &str| measure(metric, &all).expect("a metric");
        assert_eq!(of("acc").value, 0.5);
        // By bytes: -0.5 -0.5 | -0.5 -0.375 | -1.5 -0.25 | -1.5 -0.25
        assert_eq!(of("acc_norm").value, 0.75);
        // scikit-learn: matthews_corrcoef([0, 1, 1, 0], [0, 0, 1, 1]) = 0
        assert_eq!(of("mcc").value, 0.0);
        let three: Vec<&Outcome> = all[..3].to_vec();
        // matthews_corrcoef([0, 1, 1], [0, 0, 1]) = 0.5
        assert!((measure("mcc", &three).expect("a metric").value - 0.5).abs() < 1e-12);
        let p = 1.0 / (1.0 + (-1f64).exp());
        let brier = measure("brier", &all[..1]).expect("a metric").value;
        assert!((brier - 2.0 * (1.0 - p).powi(2)).abs() < 1e-12);
        assert!(measure("perplexity", &[]).is_none());
    }

    #[test]
    fn the_drop_rate_is_of_the_metric_with_an_error_by_items() {
        let written = |right: bool| Outcome::Generated {
            text: String::new(),
            right,
        };
        let (plain, attacked) = (
            [true, true, true, true, false].map(written),
            [true, false, true, false, false].map(written),
        );
        let found = drop_rate("exact", &plain.each_ref(), &attacked.each_ref()).expect("a rate");
        // (4/5 - 2/5) / (4/5)
        assert!((found.value - 0.5).abs() < 1e-12);
        // Without each: 2/3, 1/3 (twice each by symmetry), and 1/2.
        let squares = 4.0 * (1.0f64 / 6.0).powi(2);
        assert!(
            (found.stderr.expect("an error") - (0.8 * squares).sqrt()).abs() < 1e-12,
            "{found:?}"
        );
        let none = [false; 5].map(written);
        assert_eq!(drop_rate("exact", &none.each_ref(), &attacked.each_ref()), None);
        // One right answer: without it there is no rate, so no error.
        let one = [true, false].map(written);
        let found = drop_rate("exact", &one.each_ref(), &one.each_ref()).expect("a rate");
        assert_eq!((found.value, found.stderr), (0.0, None));
        let (a, b) = (chosen(&[-1.0, -2.0], 0), chosen(&[-1.0, -2.0], 1));
        let (c, d) = (chosen(&[-3.0, -1.0], 1), chosen(&[-3.0, -1.0], 0));
        let found = drop_rate("mcc", &[&a, &c, &a, &c], &[&a, &c, &b, &d]).expect("a rate");
        assert!((found.value - 1.0).abs() < 1e-12, "{found:?}");
    }

    #[test]
    fn perplexity_is_by_token_over_all_items() {
        let scored = |logprob, tokens| Outcome::Scored {
            logprob,
            tokens,
            bytes: 4,
            greedy: false,
        };
        let outcomes = [scored(-2.0, 2), scored(-6.0, 4)];
        let all: Vec<&Outcome> = outcomes.iter().collect();
        let metric = measure("perplexity", &all).expect("a metric");
        assert!((metric.value - (8.0f64 / 6.0).exp()).abs() < 1e-12);
        // Leaving out either: e^1.5 and e^1.
        let (a, b) = (1.5f64.exp(), 1f64.exp());
        let error = (0.5 * ((a - b) / 2.0).powi(2) * 2.0).sqrt();
        assert!((metric.stderr.expect("an error") - error).abs() < 1e-12);
    }
}
