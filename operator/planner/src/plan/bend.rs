//! Knots of a cost as the solver sees them: over the plane, a bend is one of three quadratics, nothing below its place,
//! and joined without a gap along the lines x = over and x + y = over, or along y = over.

use super::contest::unpacked;
use super::moments::Moments;
use super::surface::{Area, Quadratic};
use crate::cost::Knot;
use crate::units::Tokens;

/// What a bend counts tokens of.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Axis {
    /// Of the context: it lies along x = over and x + y = over.
    #[default]
    Context,
    /// Of the output: it lies along y = over.
    Output,
}

/// With v = max(0, x - over) and u = max(0, x + y - over) it is worth tin v + step (u - v) + half (u^2 - v^2); along the
/// output, step max(0, y - over), and the others are 0.
#[derive(Debug, Default, Clone, Copy, PartialEq)]
pub(crate) struct Bend {
    pub(crate) axis: Axis,
    pub(crate) over: f64,
    pub(crate) tin: f64,
    pub(crate) step: f64,
    /// Half of what a step's cost rises by for each token of context.
    pub(crate) half: f64,
}

/// Which of its quadratics a bend is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reach {
    /// x + y <= over, or y <= over: nothing.
    Below,
    /// x <= over <= x + y, or y >= over: the steps after the place.
    Steps,
    /// x >= over: all steps, and the prefill beyond it.
    All,
}

impl Bend {
    /// The bends of a knot: those along an axis that it says nothing of are left out.
    pub(crate) fn of(knot: &Knot) -> impl Iterator<Item = Self> {
        let over = f64::from(knot.over);
        let context = Self { axis: Axis::Context, over, tin: knot.tin, step: knot.step, half: 0.5 * knot.context };
        let output = Self { axis: Axis::Output, over, tin: 0.0, step: knot.tout, half: 0.0 };
        [context, output].into_iter().filter(|bend| bend.tin != 0.0 || bend.step != 0.0 || bend.half != 0.0)
    }

    /// Which quadratic it is on all of a box of token counts; None where the box lies across one of the lines.
    pub(crate) fn reach_over(&self, low: (f64, f64), high: (f64, f64)) -> Option<Reach> {
        let over = self.over;
        match self.axis {
            Axis::Context if high.0 + high.1 <= over => Some(Reach::Below),
            // Before `All`, which at the place itself is a difference of two equal terms.
            Axis::Context if high.0 <= over && low.0 + low.1 >= over => Some(Reach::Steps),
            Axis::Context if low.0 >= over => Some(Reach::All),
            Axis::Output if high.1 <= over => Some(Reach::Below),
            Axis::Output if low.1 >= over => Some(Reach::Steps),
            _ => None,
        }
    }

    #[inline]
    pub(crate) fn reach(&self, x: f64, y: f64) -> Reach {
        let before = match self.axis {
            Axis::Context => x,
            // Nothing is ever beyond the place from the first step on.
            Axis::Output => f64::NEG_INFINITY,
        };
        let after = if self.axis == Axis::Context { x + y } else { y };
        if after <= self.over {
            Reach::Below
        } else if before <= self.over {
            Reach::Steps
        } else {
            Reach::All
        }
    }
}

impl Bend {
    pub(crate) fn times(&self, weight: f64) -> Self {
        Self {
            axis: self.axis,
            over: self.over,
            tin: weight * self.tin,
            step: weight * self.step,
            half: weight * self.half,
        }
    }

    /// What the steps on contexts up to `t` tokens beyond the place cost.
    #[inline]
    fn steps(&self, t: f64) -> f64 {
        let t = t.max(0.0);
        t * (self.step + self.half * t)
    }

    #[inline]
    pub(crate) fn at(&self, x: f64, y: f64) -> f64 {
        if self.axis == Axis::Output {
            return self.step * (y - self.over).max(0.0);
        }
        if x + y <= self.over {
            return 0.0;
        }
        self.tin * (x - self.over).max(0.0) + self.steps(x + y - self.over) - self.steps(x - self.over)
    }

    /// The quadratic that it is there.
    pub(crate) fn quadratic(&self, reach: Reach) -> Quadratic {
        let Self { axis, over, tin, step, half } = *self;
        let slope = step - 2.0 * half * over;
        Quadratic(match reach {
            Reach::Steps | Reach::All if axis == Axis::Output => [-step * over, 0.0, 0.0, step, 0.0, 0.0],
            Reach::Below => [0.0; 6],
            Reach::Steps => [over * (half * over - step), slope, half, slope, 2.0 * half, half],
            Reach::All => [-tin * over, tin, 0.0, slope, 2.0 * half, half],
        })
    }

    /// No value of its quadratics within (x, y) is larger, no rounding error either.
    pub(crate) fn magnitude(&self, x: f64, y: f64) -> f64 {
        let far = x + y + self.over;
        self.tin.abs() * (x + self.over) + far * (self.step.abs() + 2.0 * self.half.abs() * far)
    }

    /// On a box: value at the centre, slopes, and how far off such a plane may be, for a box across one of the lines. Both
    /// parts are convex for coefficients of at least 0, so they lie between their tangent and their chord.
    pub(crate) fn plane(&self, area: &Area) -> Plane {
        let mut plane = Plane::default();
        let x = (area.x - area.half_x - self.over, area.x + area.half_x - self.over);
        let both = (x.0 + area.y - area.half_y, x.1 + area.y + area.half_y);
        let mut add = |value: (f64, f64), of: &dyn Fn(f64) -> f64, half: f64, slopes: (f64, f64)| {
            let (low, high) = (of(value.0), of(value.1));
            let width = value.1 - value.0;
            let slope = if width > 0.0 { (high - low) / width } else { 0.0 };
            let middle = 0.5 * (low + high);
            // Below its chord by the chord's height at the kink and what the square bends, at most.
            let kink = if value.0 < 0.0 && value.1 > 0.0 { low - slope * value.0 } else { 0.0 };
            let depth = kink.max(0.0) + 0.25 * half * width * width;
            plane.value += slopes.0 * (middle - 0.5 * depth);
            plane.dx += slopes.0 * slope;
            plane.dy += slopes.1 * slope;
            plane.slack += 0.5 * depth;
        };
        if self.axis == Axis::Output {
            let y = (area.y - area.half_y - self.over, area.y + area.half_y - self.over);
            add(y, &|t| self.step * t.max(0.0), 0.0, (1.0, 1.0));
            plane.dx = 0.0;
            return plane;
        }
        add(both, &|t| self.steps(t), self.half, (1.0, 1.0));
        add(x, &|t| self.steps(t), self.half, (-1.0, 0.0));
        add(x, &|t| self.tin * t.max(0.0), 0.0, (1.0, 0.0));
        plane
    }
}

/// A plane about the centre of a box, and how far off it is at most.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Plane {
    pub(crate) value: f64,
    pub(crate) dx: f64,
    pub(crate) dy: f64,
    pub(crate) slack: f64,
}

/// Requests kept apart by which quadratic a bend is for them.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Parted {
    steps: Moments,
    all: Moments,
}

impl Parted {
    #[inline]
    pub(crate) fn add(&mut self, bend: &Bend, tokens: Tokens) {
        match bend.reach(f64::from(tokens.input), f64::from(tokens.output)) {
            Reach::Below => {}
            Reach::Steps => self.steps.add(tokens, 1),
            Reach::All => self.all.add(tokens, 1),
        }
    }

    /// Adds requests, see `contest::packed`.
    pub(crate) fn add_all(&mut self, bend: &Bend, keys: &[u64]) {
        const RUN: usize = 128;
        let (mut steps, mut all) = ([0; RUN], [0; RUN]);
        for keys in keys.chunks(RUN) {
            let (mut in_steps, mut in_all) = (0, 0);
            for key in keys {
                let tokens = unpacked(*key);
                let reach = bend.reach(f64::from(tokens.input), f64::from(tokens.output));
                // Written to where the next one is to go, and left there if it belongs there: no branch to guess.
                steps[in_steps] = *key;
                all[in_all] = *key;
                in_steps += usize::from(reach == Reach::Steps);
                in_all += usize::from(reach == Reach::All);
            }
            self.steps.merge(&Moments::of(&steps[..in_steps]));
            self.all.merge(&Moments::of(&all[..in_all]));
        }
    }

    pub(crate) fn merge(&mut self, reach: Reach, moments: &Moments) {
        match reach {
            Reach::Below => {}
            Reach::Steps => self.steps.merge(moments),
            Reach::All => self.all.merge(moments),
        }
    }

    /// The sum of a bend over the requests added.
    pub(crate) fn sum_of(&self, bend: &Bend) -> f64 {
        let sum = |reach, moments: &Moments| moments.sum_of(&bend.quadratic(reach).0);
        sum(Reach::Steps, &self.steps) + sum(Reach::All, &self.all)
    }

    /// The same in fixed point.
    pub(crate) fn sum_of_fixed(&self, bend: &FixedBend) -> i128 {
        let sum = |reach, moments: &Moments| moments.sum_of_fixed(&bend.quadratic(reach));
        sum(Reach::Steps, &self.steps) + sum(Reach::All, &self.all)
    }
}

/// A bend with integer coefficients in quanta.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct FixedBend {
    pub(crate) axis: Axis,
    pub(crate) over: u32,
    pub(crate) tin: i128,
    pub(crate) step: i128,
    pub(crate) half: i128,
}

impl FixedBend {
    #[inline]
    pub(crate) fn at(&self, tokens: Tokens) -> i128 {
        let beyond = |tokens: u32| i128::from(tokens.saturating_sub(self.over));
        if self.axis == Axis::Output {
            return self.step * beyond(tokens.output);
        }
        let (v, u) = (beyond(tokens.input), beyond(tokens.input + tokens.output));
        self.tin * v + (u - v) * (self.step + self.half * (u + v))
    }

    fn quadratic(&self, reach: Reach) -> [i128; 6] {
        let (over, half) = (i128::from(self.over), self.half);
        let slope = self.step - 2 * half * over;
        match reach {
            Reach::Below => [0; 6],
            Reach::Steps | Reach::All if self.axis == Axis::Output => [-self.step * over, 0, 0, self.step, 0, 0],
            Reach::Steps => [over * (half * over - self.step), slope, half, slope, 2 * half, half],
            Reach::All => [-self.tin * over, self.tin, 0, slope, 2 * half, half],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::contest::packed;
    use super::*;
    use proptest::prelude::*;

    fn bend() -> impl Strategy<Value = (Knot, Bend)> {
        (0u32..80, 0.1..3.0f64, 0.0..3.0f64, 0.0..0.2f64, any::<bool>()).prop_map(
            |(over, tin, step, context, output)| {
                let along_output = Knot { over, tout: tin, ..Knot::default() };
                let knot = if output { along_output } else { Knot { over, tin, step, context, tout: 0.0 } };
                (knot, Bend::of(&knot).next().unwrap())
            },
        )
    }

    #[test]
    fn a_knot_has_a_bend_along_each_axis_that_it_speaks_of() {
        let knot = Knot { over: 7, tin: 0.0, step: 1.0, context: 0.0, tout: 2.0 };
        let bends: Vec<_> = Bend::of(&knot).collect();
        assert_eq!(bends.iter().map(|bend| bend.axis).collect::<Vec<_>>(), [Axis::Context, Axis::Output]);
        assert_eq!(bends.iter().map(|bend| bend.at(5.0, 9.0)).sum::<f64>(), knot.at_point(5.0, 9.0));
        assert_eq!(Bend::of(&Knot { over: 7, ..Knot::default() }).count(), 0);
    }

    #[test]
    fn a_box_of_one_point_is_where_the_point_is() {
        let knot = Knot { over: 64, tin: 1.0, ..Knot::default() };
        let bend = Bend::of(&knot).next().unwrap();
        for point in [(64.0, 8.0), (63.0, 8.0), (60.0, 4.0), (64.0, 0.0), (65.0, 0.0)] {
            assert_eq!(bend.reach_over(point, point), Some(bend.reach(point.0, point.1)), "{point:?}");
        }
    }

    proptest! {
        #[test]
        fn a_bend_is_its_knot_and_one_of_its_quadratics((knot, bend) in bend(), x in 0u32..100, y in 0u32..100) {
            let (tokens, x, y) = (Tokens { input: x, output: y }, f64::from(x), f64::from(y));
            let expected = knot.at_point(x, y);
            let near = |value: f64| (value - expected).abs() <= 1e-9 * (1.0 + bend.magnitude(x, y));
            prop_assert!(near(bend.at(x, y)));
            prop_assert!(near(bend.quadratic(bend.reach(x, y)).at(x, y)));
            let mut parted = Parted::default();
            parted.add(&bend, tokens);
            prop_assert!(near(parted.sum_of(&bend)));
            let (mut one_by_one, mut together) = (Parted::default(), Parted::default());
            let apart = |i: u32| Tokens { input: (tokens.input + 7 * i) % 101, output: (tokens.output + 3 * i) % 97 };
            let many: Vec<Tokens> = (0..300).map(apart).collect();
            many.iter().for_each(|tokens| one_by_one.add(&bend, *tokens));
            together.add_all(&bend, &many.iter().map(|tokens| packed(*tokens)).collect::<Vec<_>>());
            prop_assert_eq!((one_by_one.steps, one_by_one.all), (together.steps, together.all));
            let context = FixedBend { axis: bend.axis, over: knot.over, tin: 3, step: 5, half: 7 };
            let output = FixedBend { tin: 0, half: 0, ..context };
            let fixed = if bend.axis == Axis::Output { output } else { context };
            prop_assert_eq!(parted.sum_of_fixed(&fixed), fixed.at(tokens));
        }

        #[test]
        fn a_plane_bounds_its_bend(
            (_, bend) in bend(), x in 0u32..100, y in 0u32..100, wx in 0u32..40, wy in 0u32..40,
            at in (-1.0..=1.0f64, -1.0..=1.0f64),
        ) {
            let area = Area {
                x: f64::from(x) + 0.5 * f64::from(wx), half_x: 0.5 * f64::from(wx),
                y: f64::from(y) + 0.5 * f64::from(wy), half_y: 0.5 * f64::from(wy),
            };
            let plane = bend.plane(&area);
            let (dx, dy) = (at.0 * area.half_x, at.1 * area.half_y);
            let off = bend.at(area.x + dx, area.y + dy) - (plane.value + plane.dx * dx + plane.dy * dy);
            prop_assert!(off.abs() <= plane.slack + 1e-9 * (1.0 + bend.magnitude(140.0, 140.0)), "{} {}", off, plane.slack);
        }
    }
}
