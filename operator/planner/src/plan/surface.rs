//! Costs over the (x, y) plane as the solver sees them: quadratics with bends, the larger of several, and their bounds on
//! a box.

use super::bend::{Bend, Plane, Reach};
use crate::cost::{Cost, Terms};
use crate::units::Tokens;

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
            slack: 0.0,
        }
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

impl Area {
    /// The corners with the least and the most tokens.
    pub(crate) fn corners(&self) -> ((f64, f64), (f64, f64)) {
        ((self.x - self.half_x, self.y - self.half_y), (self.x + self.half_x, self.y + self.half_y))
    }
}

#[derive(Debug, Default, Clone, Copy)]
struct Local {
    value: f64,
    dx: f64,
    dy: f64,
    xx: f64,
    xy: f64,
    yy: f64,
    /// How far off all of this may be, either way.
    slack: f64,
}

impl Local {
    fn add(&mut self, by: &Self) {
        self.value += by.value;
        self.dx += by.dx;
        self.dy += by.dy;
        self.xx += by.xx;
        self.xy += by.xy;
        self.yy += by.yy;
    }

    fn add_plane(&mut self, plane: &Plane) {
        self.value += plane.value;
        self.dx += plane.dx;
        self.dy += plane.dy;
        self.slack += plane.slack;
    }

    /// A lower bound of self - other over the box, each of the six terms at its worst.
    #[inline]
    fn low_above(&self, other: &Self, area: &Area) -> f64 {
        let (wx, wy) = (area.half_x, area.half_y);
        (self.value - other.value) - (self.dx - other.dx).abs() * wx - (self.dy - other.dy).abs() * wy
            + (self.xx - other.xx).min(0.0) * wx * wx
            + (self.yy - other.yy).min(0.0) * wy * wy
            - (self.xy - other.xy).abs() * wx * wy
            - (self.slack + other.slack)
    }
}

/// The largest of one to four quadratics with bends: a cost with a floor has two, an energy and a run time with floors
/// make four.
#[derive(Debug, Default, Clone)]
pub(crate) struct Surface {
    faces: [Quadratic; 4],
    len: usize,
    /// By face; nothing at all where no face has any.
    bends: Vec<Vec<Bend>>,
}

impl Surface {
    /// The cost of requests with token counts between `low` and `high`.
    pub(crate) fn of(cost: &Cost, low: Tokens, high: Tokens) -> Self {
        let mut surface = Self::flat(cost.terms.into());
        if let Some(floor) = cost.floor_terms {
            surface.faces[1] = floor.into();
            surface.len = 2;
        }
        let corner = |tokens: Tokens| (f64::from(tokens.input), f64::from(tokens.output));
        let mut bends = vec![];
        for bend in cost.knots.iter().flat_map(Bend::of) {
            // A knot beyond all requests, or before all of them, is none.
            match bend.reach_over(corner(low), corner(high)) {
                Some(reach) => surface.faces[0] = surface.faces[0].plus(1.0, &bend.quadratic(reach)),
                None => bends.push(bend),
            }
        }
        if !bends.is_empty() {
            surface.bends = vec![vec![]; surface.len];
            surface.bends[0] = bends;
        }
        surface
    }

    /// The largest of one to four faces.
    pub(crate) fn new(faces: impl Iterator<Item = (Quadratic, Vec<Bend>)>) -> Self {
        let mut surface = Self::default();
        for (face, bends) in faces {
            surface.faces[surface.len] = face;
            surface.len += 1;
            surface.bends.push(bends);
        }
        if surface.bends.iter().all(Vec::is_empty) {
            surface.bends.clear();
        }
        surface
    }

    pub(crate) fn flat(face: Quadratic) -> Self {
        let mut faces = [Quadratic::default(); 4];
        faces[0] = face;
        Self { faces, len: 1, bends: vec![] }
    }

    pub(crate) fn faces(&self) -> &[Quadratic] {
        &self.faces[..self.len]
    }

    pub(crate) fn bends(&self, face: usize) -> &[Bend] {
        self.bends.get(face).map_or(&[], Vec::as_slice)
    }

    /// The number of bends of the face with the most.
    pub(crate) fn most_bends(&self) -> usize {
        self.bends.iter().map(Vec::len).max().unwrap_or(0)
    }

    /// Whether this is one quadratic everywhere.
    pub(crate) fn is_plain(&self) -> bool {
        self.len == 1 && self.bends.is_empty()
    }

    /// weight * self + other_weight * other, for weights >= 0 and at most two faces each.
    pub(crate) fn blend(&self, weight: f64, other: &Self, other_weight: f64) -> Self {
        debug_assert!(self.len * other.len <= 4 && weight >= 0.0 && other_weight >= 0.0);
        let zero = Quadratic::default();
        // A weight of zero makes all faces of its side equal: one is enough.
        let faces = |of: &Self, weight: f64| if weight == 0.0 { 1 } else { of.len };
        let scaled = |of: &[Bend], weight: f64| of.iter().map(|b| b.times(weight)).collect::<Vec<_>>();
        let pairs =
            (0..faces(self, weight)).flat_map(|own| (0..faces(other, other_weight)).map(move |with| (own, with)));
        Self::new(pairs.map(|(own, with)| {
            let mut bends = if weight == 0.0 { vec![] } else { scaled(self.bends(own), weight) };
            if other_weight != 0.0 {
                bends.extend(scaled(other.bends(with), other_weight));
            }
            (zero.plus(weight, &self.faces[own]).plus(other_weight, &other.faces[with]), bends)
        }))
    }

    /// Adds a quadratic to every face.
    pub(crate) fn raised(&self, by: &Quadratic) -> Self {
        let mut raised = self.clone();
        for face in &mut raised.faces[..raised.len] {
            *face = face.plus(1.0, by);
        }
        raised
    }

    /// The one quadratic that this is on all of a box of token counts, if it has one face and none of its bends is in there.
    pub(crate) fn folded(&self, low: (f64, f64), high: (f64, f64)) -> Option<Quadratic> {
        let mut folded = (self.len == 1).then_some(self.faces[0])?;
        for bend in self.bends(0) {
            folded = folded.plus(1.0, &bend.quadratic(bend.reach_over(low, high)?));
        }
        Some(folded)
    }

    /// The value of one face.
    #[inline]
    pub(crate) fn face_at(&self, face: usize, x: f64, y: f64) -> f64 {
        let bends = self.bends(face).iter().map(|bend| bend.at(x, y)).sum::<f64>();
        self.faces[face].at(x, y) + bends
    }

    #[inline]
    pub(crate) fn at(&self, x: f64, y: f64) -> f64 {
        if !self.bends.is_empty() {
            return (0..self.len).map(|face| self.face_at(face, x, y)).fold(f64::NEG_INFINITY, f64::max);
        }
        let mut value = self.faces[0].at(x, y);
        for face in &self.faces[1..self.len] {
            value = value.max(face.at(x, y));
        }
        value
    }

    /// The face that gives the value, and the value.
    #[inline]
    pub(crate) fn top(&self, x: f64, y: f64) -> (usize, f64) {
        let (mut top, mut value) = (0, f64::NEG_INFINITY);
        for face in 0..self.len {
            let here = self.face_at(face, x, y);
            if here > value {
                (top, value) = (face, here);
            }
        }
        (top, value)
    }

    pub(crate) fn magnitude(&self, x: f64, y: f64) -> f64 {
        let of_face = |face: usize| {
            let bends = self.bends(face).iter().map(|bend| bend.magnitude(x, y));
            self.faces[face].magnitude(x, y) + bends.sum::<f64>()
        };
        (0..self.len).map(of_face).fold(0.0, f64::max)
    }

    /// Writes the surface about the centre of a box.
    #[inline]
    pub(crate) fn about(&self, area: &Area, local: &mut LocalSurface) {
        local.len = self.len;
        for (local, face) in local.faces.iter_mut().zip(self.faces()) {
            *local = face.about(area);
        }
        if !self.bends.is_empty() {
            self.bend_about(area, local);
        }
    }

    fn bend_about(&self, area: &Area, local: &mut LocalSurface) {
        let (low, high) = area.corners();
        for (local, bends) in local.faces.iter_mut().zip(&self.bends) {
            for bend in bends {
                match bend.reach_over(low, high) {
                    Some(Reach::Below) => {}
                    Some(reach) => local.add(&bend.quadratic(reach).about(area)),
                    None => local.add_plane(&bend.plane(area)),
                }
            }
        }
    }

    /// The surface about the centre of a box.
    pub(crate) fn locally(&self, area: &Area) -> LocalSurface {
        let mut local = LocalSurface::EMPTY;
        self.about(area, &mut local);
        local
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
        Self { faces: [Local { value: 0.0, dx: 0.0, dy: 0.0, xx: 0.0, xy: 0.0, yy: 0.0, slack: 0.0 }; 4], len: 0 };

    /// The face that is above the others by more than `error` all over the box.
    pub(crate) fn top(&self, area: &Area, error: f64) -> Option<usize> {
        let faces = &self.faces[..self.len];
        let above = |top: usize, other: usize| top == other || faces[top].low_above(&faces[other], area) > error;
        (0..self.len).find(|top| (0..self.len).all(|other| above(*top, other)))
    }

    /// Whether a face is at least 0 (true) or below 0 (false) all over the box, if it is either.
    pub(crate) fn sign(&self, face: usize, area: &Area) -> Option<bool> {
        let zero = Local::default();
        if self.faces[face].low_above(&zero, area) >= 0.0 {
            Some(true)
        } else {
            (zero.low_above(&self.faces[face], area) > 0.0).then_some(false)
        }
    }

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
            let low = a.locally(&area).low_above(&b.locally(&area), &area);
            for i in 0..=8 {
                for j in 0..=8 {
                    let (px, py) = (x + half_x * f64::from(i - 4) / 4.0, y + half_y * f64::from(j - 4) / 4.0);
                    assert!(low <= a.at(px, py) - b.at(px, py) + 1e-9);
                }
            }
        }
    }

    #[test]
    fn knots_bend_a_surface_where_its_requests_cross_them() {
        let mut cost = Cost::from(Terms { constant: 1.0, tout: 2.0, ..Terms::default() });
        (cost.knot_mut(5).step, cost.knot_mut(20).context, cost.knot_mut(900).tin) = (1.0, 0.5, 3.0);
        cost.knot_mut(5).tout = 4.0;
        cost.floor_terms = Some(Terms { constant: 60.0, ..Terms::default() });
        let (low, high) = (Tokens { input: 2, output: 1 }, Tokens { input: 30, output: 40 });
        let surface = Surface::of(&cost, low, high);
        assert_eq!((surface.bends(0).len(), surface.bends(1).len()), (3, 0));
        for (x, y) in [(2, 1), (2, 40), (30, 40), (5, 0), (5, 1), (20, 3), (19, 1), (7, 30)] {
            let (x, y) = (f64::from(x), f64::from(y));
            assert!((surface.at(x, y) - cost.at_point(x, y)).abs() < 1e-9);
        }
        let late = Surface::of(&cost, Tokens { input: 20, output: 5 }, high);
        assert!(late.bends(0).is_empty() && (late.at(25.0, 9.0) - cost.at_point(25.0, 9.0)).abs() < 1e-9);
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
