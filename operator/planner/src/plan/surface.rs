//! Costs over the (x, y) plane as the solver sees them: quadratics, the larger of several, and their bounds on a box.

use crate::cost::{Cost, Terms};

/// Coefficients of 1, x, x^2, y, x y, y^2.
#[derive(Debug, Default, Clone, Copy, PartialEq)]
pub(crate) struct Quadratic(pub(crate) [f64; 6]);

impl From<Terms> for Quadratic {
    fn from(terms: Terms) -> Self {
        Self([terms.constant, terms.tin, terms.tin2, terms.tout, terms.tin_tout, terms.tout2])
    }
}

impl Quadratic {
    #[inline]
    pub(crate) fn at(&self, x: f64, y: f64) -> f64 {
        let [c, cx, cxx, cy, cxy, cyy] = self.0;
        c + x * (cx + cxx * x + cxy * y) + y * (cy + cyy * y)
    }

    /// self + weight * other
    pub(crate) fn plus(&self, weight: f64, other: &Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] + weight * other.0[i]))
    }

    /// Sum of the terms' magnitudes at the far corner (x, y): no value within it is larger, no rounding error either.
    pub(crate) fn magnitude(&self, x: f64, y: f64) -> f64 {
        Self(self.0.map(f64::abs)).at(x, y)
    }

    /// Taylor coefficients about the centre of a box.
    #[inline]
    fn about(&self, area: &Area) -> Local {
        let [_, cx, cxx, cy, cxy, cyy] = self.0;
        Local {
            value: self.at(area.x, area.y),
            dx: cx + 2.0 * cxx * area.x + cxy * area.y,
            dy: cy + 2.0 * cyy * area.y + cxy * area.x,
            xx: cxx,
            xy: cxy,
            yy: cyy,
        }
    }

    /// A lower bound over the box.
    pub(crate) fn low(&self, area: &Area) -> f64 {
        self.about(area).low_above(&Local::default(), area)
    }

    /// An upper bound over the box.
    pub(crate) fn high(&self, area: &Area) -> f64 {
        -Local::default().low_above(&self.about(area), area)
    }
}

/// A box of the plane by its centre and half widths.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Area {
    pub(crate) x: f64,
    pub(crate) y: f64,
    pub(crate) half_x: f64,
    pub(crate) half_y: f64,
}

#[derive(Debug, Default, Clone, Copy)]
struct Local {
    value: f64,
    dx: f64,
    dy: f64,
    xx: f64,
    xy: f64,
    yy: f64,
}

impl Local {
    /// A lower bound of self - other over the box, each of the six terms at its worst.
    #[inline]
    fn low_above(&self, other: &Self, area: &Area) -> f64 {
        let (wx, wy) = (area.half_x, area.half_y);
        (self.value - other.value) - (self.dx - other.dx).abs() * wx - (self.dy - other.dy).abs() * wy
            + (self.xx - other.xx).min(0.0) * wx * wx
            + (self.yy - other.yy).min(0.0) * wy * wy
            - (self.xy - other.xy).abs() * wx * wy
    }
}

/// The largest of one to four quadratics: a cost with a floor has two, an energy and a run time with floors make four.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Surface {
    faces: [Quadratic; 4],
    len: usize,
}

impl Surface {
    pub(crate) fn of(cost: &Cost) -> Self {
        let mut surface = Self::flat(cost.terms.into());
        if let Some(floor) = cost.floor_terms {
            surface.faces[1] = floor.into();
            surface.len = 2;
        }
        surface
    }

    pub(crate) fn flat(face: Quadratic) -> Self {
        let mut faces = [Quadratic::default(); 4];
        faces[0] = face;
        Self { faces, len: 1 }
    }

    pub(crate) fn faces(&self) -> &[Quadratic] {
        &self.faces[..self.len]
    }

    /// weight * self + other_weight * other, for weights >= 0 and at most two faces each.
    pub(crate) fn blend(&self, weight: f64, other: &Self, other_weight: f64) -> Self {
        debug_assert!(self.len * other.len <= 4 && weight >= 0.0 && other_weight >= 0.0);
        let zero = Quadratic::default();
        let mut blend = Self::default();
        // A weight of zero makes all faces of its side equal: one is enough.
        let own = if weight == 0.0 { &self.faces[..1] } else { self.faces() };
        let others = if other_weight == 0.0 { &other.faces[..1] } else { other.faces() };
        for face in own {
            for with in others {
                blend.faces[blend.len] = zero.plus(weight, face).plus(other_weight, with);
                blend.len += 1;
            }
        }
        blend
    }

    /// Adds a quadratic to every face.
    pub(crate) fn raised(&self, by: &Quadratic) -> Self {
        let mut raised = *self;
        for face in &mut raised.faces[..raised.len] {
            *face = face.plus(1.0, by);
        }
        raised
    }

    #[inline]
    pub(crate) fn at(&self, x: f64, y: f64) -> f64 {
        let mut value = self.faces[0].at(x, y);
        for face in &self.faces[1..self.len] {
            value = value.max(face.at(x, y));
        }
        value
    }

    pub(crate) fn magnitude(&self, x: f64, y: f64) -> f64 {
        self.faces().iter().fold(0.0, |largest, face| face.magnitude(x, y).max(largest))
    }

    pub(crate) fn about(&self, area: &Area) -> LocalSurface {
        let mut faces = [Local::default(); 4];
        for (local, face) in faces.iter_mut().zip(self.faces()) {
            *local = face.about(area);
        }
        LocalSurface { faces, len: self.len }
    }
}

/// A surface about the centre of a box.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LocalSurface {
    faces: [Local; 4],
    len: usize,
}

impl LocalSurface {
    pub(crate) const EMPTY: Self =
        Self { faces: [Local { value: 0.0, dx: 0.0, dy: 0.0, xx: 0.0, xy: 0.0, yy: 0.0 }; 4], len: 0 };

    /// The value at the centre.
    #[inline]
    pub(crate) fn centre(&self) -> f64 {
        let mut value = self.faces[0].value;
        for face in &self.faces[1..self.len] {
            value = value.max(face.value);
        }
        value
    }

    /// A lower bound of self - other over the box.
    #[inline]
    pub(crate) fn low_above(&self, other: &Self, area: &Area) -> f64 {
        if self.len == 1 && other.len == 1 {
            return self.faces[0].low_above(&other.faces[0], area);
        }
        // max(a, b) - max(c, d) = min over c, d of max over a, b of the differences.
        let against = |with: &Local| {
            self.faces[..self.len].iter().map(|face| face.low_above(with, area)).fold(f64::NEG_INFINITY, f64::max)
        };
        other.faces[..other.len].iter().map(against).fold(f64::INFINITY, f64::min)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn surface(faces: &[[f64; 6]]) -> Surface {
        let mut built = Surface::default();
        for face in faces {
            built.faces[built.len] = Quadratic(*face);
            built.len += 1;
        }
        built
    }

    #[test]
    fn bounds_of_differences_hold_at_every_point_of_the_box() {
        let a = surface(&[[1.0, 0.5, -0.01, 2.0, 0.003, 0.02], [40.0, 0.0, 0.0, 0.0, 0.0, 0.0]]);
        let b = surface(&[[3.0, 0.4, 0.02, 1.0, -0.005, -0.01], [10.0, 1.0, 0.0, 0.1, 0.0, 0.0]]);
        for (x, y, half_x, half_y) in [(10.0, 10.0, 10.0, 10.0), (35.0, 4.5, 3.0, 4.5), (8.0, 60.0, 0.0, 7.0)] {
            let area = Area { x, y, half_x, half_y };
            let low = a.about(&area).low_above(&b.about(&area), &area);
            for i in 0..=8 {
                for j in 0..=8 {
                    let (px, py) = (x + half_x * f64::from(i - 4) / 4.0, y + half_y * f64::from(j - 4) / 4.0);
                    assert!(low <= a.at(px, py) - b.at(px, py) + 1e-9);
                }
            }
        }
    }

    #[test]
    fn a_blend_is_the_weighted_sum() {
        let a = surface(&[[1.0, 0.5, 0.0, 2.0, 0.0, 0.0], [40.0, 0.0, 0.0, 0.0, 0.0, 0.0]]);
        let b = surface(&[[3.0, 0.4, 0.0, 1.0, 0.0, 0.0], [10.0, 1.0, 0.0, 0.1, 0.0, 0.0]]);
        let blend = a.blend(0.5, &b, 2.0);
        assert_eq!(blend.faces().len(), 4);
        for (x, y) in [(0.0, 0.0), (3.0, 50.0), (70.0, 2.0)] {
            assert!((blend.at(x, y) - (0.5 * a.at(x, y) + 2.0 * b.at(x, y))).abs() < 1e-9);
        }
    }
}
