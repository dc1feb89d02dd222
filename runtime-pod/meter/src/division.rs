//! Division of a number among parties by weights, such that nothing is lost and nothing made.

/// Divides `amount` among parties in proportion to their weights: each gets `amount * weight / total`, rounded down, and
/// what is left is returned beside. `total` is the sum of all weights or more; then the rest also holds the share of those
/// who are not listed. With a `total` of 0 everything is left.
///
/// # Panics
/// Never: a total below the sum of the weights is taken for that sum.
#[must_use]
pub fn divide(amount: u64, weights: &[u64], total: u64) -> (Vec<u64>, u64) {
    let sum: u128 = weights.iter().map(|&weight| u128::from(weight)).sum();
    let total = u128::from(total).max(sum);
    if total == 0 {
        return (vec![0; weights.len()], amount);
    }
    // The quotient is at most `amount`: a weight is at most the total.
    let part = |weight: u64| u64::try_from(u128::from(amount) * u128::from(weight) / total).unwrap_or(amount);
    let parts: Vec<u64> = weights.iter().map(|&weight| part(weight)).collect();
    // At most `amount` in all, since each part was rounded down.
    let given: u64 = parts.iter().sum();
    (parts, amount - given)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn parts_and_rest() {
        type Case<'a> = (u64, &'a [u64], u64, &'a [u64], u64);
        let cases: &[Case] = &[
            (100, &[1, 1], 4, &[25, 25], 50),
            (100, &[1, 2], 3, &[33, 66], 1),
            (100, &[3], 1, &[100], 0),
            (100, &[0, 0], 0, &[0, 0], 100),
            (100, &[], 9, &[], 100),
            (u64::MAX, &[u64::MAX, u64::MAX], 0, &[u64::MAX / 2, u64::MAX / 2], 1),
        ];
        for (amount, weights, total, parts, rest) in cases {
            assert_eq!(divide(*amount, weights, *total), (parts.to_vec(), *rest), "{amount} by {weights:?} of {total}");
        }
    }

    proptest! {
        #[test]
        fn nothing_is_lost_and_nobody_gets_a_unit_less_than_due(
            amount in any::<u64>(),
            weights in prop::collection::vec(0..=u64::MAX / 64, 0..20),
            total in 0..=u64::MAX / 2,
        ) {
            let (parts, rest) = divide(amount, &weights, total);
            let all: u128 = parts.iter().map(|&part| u128::from(part)).sum::<u128>() + u128::from(rest);
            prop_assert_eq!(all, u128::from(amount));
            let total = u128::from(total).max(weights.iter().map(|&weight| u128::from(weight)).sum());
            for (part, weight) in parts.iter().zip(&weights) {
                prop_assert!((u128::from(*part) + 1) * total > u128::from(amount) * u128::from(*weight));
            }
        }
    }
}
