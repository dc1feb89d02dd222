//! The points of a campaign and the random order in which they are measured.

/// Input and output lengths and the batch of a measurement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Point {
    /// Sequences decoded together.
    pub batch: u32,
    /// Input tokens of each.
    pub x: u32,
    /// Output tokens of each.
    pub y: u32,
}

impl Point {
    /// All points, each once.
    #[must_use]
    pub fn all(batch_sizes: &[u32], tokens_in: &[u32], tokens_out: &[u32]) -> Vec<Self> {
        let mut points: Vec<Self> = Vec::with_capacity(batch_sizes.len() * tokens_in.len() * tokens_out.len());
        for &batch in batch_sizes {
            for &x in tokens_in {
                points.extend(tokens_out.iter().map(|&y| Self { batch, x, y }));
            }
        }
        points.sort_unstable();
        points.dedup();
        points
    }

    /// Tokens that a sequence of it takes in the context.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.x as usize + self.y as usize
    }
}

/// Random numbers that depend on the seed alone: SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
#[derive(Debug, Clone)]
pub struct Shuffle(u64);

impl Shuffle {
    /// A sequence of its own for every pair.
    #[must_use]
    pub fn new(seed: u64, stream: u64) -> Self {
        let mut mixed = Self(seed);
        let first = mixed.draw();
        Self(first ^ stream.wrapping_mul(0xD129_0B26_8B4E_6D35))
    }

    /// The next number.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `limit`, which is at least 1.
    pub fn below(&mut self, limit: u64) -> u64 {
        // The product's upper half; the bias is below limit / 2^64.
        ((u128::from(self.draw()) * u128::from(limit.max(1))) >> 64) as u64
    }

    /// Every order is as likely (Fisher and Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            let other = self.below(last as u64 + 1) as usize;
            items.swap(last, other);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pair_is_a_point_once() {
        let points = Point::all(&[1, 4], &[8, 16, 8], &[32]);
        assert_eq!(points.len(), 4);
        assert_eq!(points[0], Point { batch: 1, x: 8, y: 32 });
        assert_eq!(points[0].tokens(), 40);
    }

    #[test]
    fn an_order_is_repeatable_complete_and_differs_by_round() {
        let order = |seed, round| {
            let mut items: Vec<u32> = (0..50).collect();
            Shuffle::new(seed, round).shuffle(&mut items);
            items
        };
        assert_eq!(order(1, 0), order(1, 0));
        assert_ne!(order(1, 0), order(1, 1));
        assert_ne!(order(1, 0), order(2, 0));
        let mut sorted = order(1, 0);
        sorted.sort_unstable();
        assert_eq!(sorted, (0..50).collect::<Vec<_>>());
    }

    #[test]
    fn numbers_below_a_limit_are_spread_evenly() {
        let mut random = Shuffle::new(7, 7);
        let mut counts = [0_u32; 5];
        for _ in 0..10_000 {
            counts[random.below(5) as usize] += 1;
        }
        assert!(counts.iter().all(|count| (1800..2200).contains(count)), "{counts:?}");
    }
}
