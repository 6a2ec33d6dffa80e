//! Small dense systems: positive definite matrices of a few rows.

/// The lower factor of a positive definite matrix.
pub(super) fn cholesky(mut matrix: Vec<Vec<f64>>) -> Option<Vec<Vec<f64>>> {
    let n = matrix.len();
    for i in 0..n {
        for j in 0..=i {
            let known: f64 = (0..j).map(|k| matrix[i][k] * matrix[j][k]).sum();
            let left = matrix[i][j] - known;
            matrix[i][j] = match i == j {
                true if left > 0.0 => left.sqrt(),
                true => return None,
                false => left / matrix[j][j],
            };
        }
    }
    Some(matrix)
}

/// x of `factor` x = `values`.
pub(super) fn solve_lower(factor: &[Vec<f64>], values: &[f64]) -> Vec<f64> {
    let mut x = values.to_vec();
    for i in 0..x.len() {
        let known: f64 = (0..i).map(|k| factor[i][k] * x[k]).sum();
        x[i] = (x[i] - known) / factor[i][i];
    }
    x
}

/// x of `factor` `factor`^T x = `values`.
pub(super) fn solve(factor: &[Vec<f64>], values: &[f64]) -> Vec<f64> {
    let mut x = solve_lower(factor, values);
    let n = x.len();
    for i in (0..n).rev() {
        let known: f64 = (i + 1..n).map(|k| factor[k][i] * x[k]).sum();
        x[i] = (x[i] - known) / factor[i][i];
    }
    x
}
