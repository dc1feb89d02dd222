//! The functions between the two products of an MLP, over whole vectors.

use super::simd::{Simd, exp};

/// A function of one value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// x * sigmoid(x), also called swish.
    Silu,
    /// x times the normal distribution's integral up to x.
    Gelu,
    /// The same with the integral approximated by a hyperbolic tangent (Hendrycks and Gimpel, 2016).
    GeluTanh,
    /// The larger of x and 0.
    Relu,
}

impl Activation {
    /// `values` = function of `values`, times `others` where there are some.
    ///
    /// # Safety
    /// As for [`Simd`]; both are of whole vectors, and `others` as long as `values`.
    #[inline(always)]
    pub(super) unsafe fn apply<S: Simd>(self, values: &mut [f32], others: Option<&[f32]>) {
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                Self::Silu => each::<S, Silu>(values, others),
                Self::Gelu => each::<S, Gelu>(values, others),
                Self::GeluTanh => each::<S, GeluTanh>(values, others),
                Self::Relu => each::<S, Relu>(values, others),
            }
        }
    }
}

/// A function of a vector: a type of its own, so that the loop over vectors is compiled for each.
trait Function {
    /// # Safety
    /// As for [`Simd`].
    unsafe fn of<S: Simd>(x: S::V) -> S::V;
}

/// # Safety
/// As for [`Activation::apply`].
#[inline(always)]
unsafe fn each<S: Simd, F: Function>(values: &mut [f32], others: Option<&[f32]>) {
    debug_assert!(values.len().is_multiple_of(S::LANES) && others.is_none_or(|o| o.len() == values.len()));
    let to = values.as_mut_ptr();
    let mut i = 0;
    while i < values.len() {
        // SAFETY: a vector begins at each multiple of the lanes below the length, in both.
        unsafe {
            let mut y = F::of::<S>(S::load(to.add(i)));
            if let Some(others) = others {
                y = S::mul(y, S::load(others.as_ptr().add(i)));
            }
            S::store(y, to.add(i));
        }
        i += S::LANES;
    }
}

/// x / (1 + e^-y).
///
/// # Safety
/// As for [`Simd`].
#[inline(always)]
unsafe fn times_sigmoid<S: Simd>(x: S::V, y: S::V) -> S::V {
    // SAFETY: the caller's promise.
    unsafe {
        let one = S::splat(1.0);
        let sigmoid = S::div(one, S::add(one, exp::<S>(S::mul(y, S::splat(-1.0)))));
        S::mul(x, sigmoid)
    }
}

struct Silu;
impl Function for Silu {
    #[inline(always)]
    unsafe fn of<S: Simd>(x: S::V) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { times_sigmoid::<S>(x, x) }
    }
}

struct GeluTanh;
impl Function for GeluTanh {
    /// (1 + tanh y) / 2 is the sigmoid of 2 y.
    #[inline(always)]
    unsafe fn of<S: Simd>(x: S::V) -> S::V {
        // SAFETY: the caller's promise.
        unsafe {
            let cubic = S::fma(S::mul(S::mul(x, x), S::splat(0.044_715)), x, x);
            times_sigmoid::<S>(x, S::mul(cubic, S::splat(2.0 * 0.797_884_6)))
        }
    }
}

struct Gelu;
impl Function for Gelu {
    /// x > 0: x - x * tail(x), else x * tail(-x), with the normal distribution's upper tail after Abramowitz and Stegun,
    /// 7.1.26, whose error is below 1e-7.
    #[inline(always)]
    unsafe fn of<S: Simd>(x: S::V) -> S::V {
        // SAFETY: the caller's promise.
        unsafe {
            let one = S::splat(1.0);
            let magnitude = S::max(S::mul(x, S::splat(-1.0)), x);
            let z = S::mul(magnitude, S::splat(std::f32::consts::FRAC_1_SQRT_2));
            let t = S::div(one, S::fma(z, S::splat(0.327_591_1), one));
            let mut p = S::splat(1.061_405_4);
            for c in [-1.453_152, 1.421_413_7, -0.284_496_74, 0.254_829_6] {
                p = S::fma(p, t, S::splat(c));
            }
            let decline = exp::<S>(S::mul(S::mul(z, z), S::splat(-1.0)));
            let tail = S::mul(S::mul(p, t), S::mul(decline, S::splat(0.5)));
            S::fma(S::mul(magnitude, tail), S::splat(-1.0), Relu::of::<S>(x))
        }
    }
}

struct Relu;
impl Function for Relu {
    #[inline(always)]
    unsafe fn of<S: Simd>(x: S::V) -> S::V {
        // SAFETY: the caller's promise. The second operand is what a comparison with no number gives, so that one stays.
        unsafe { S::max(S::splat(0.0), x) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Isa;
    use crate::cpu::simd::Kernel;

    struct Apply<'a>(Activation, &'a mut [f32], Option<&'a [f32]>);
    impl Kernel for Apply<'_> {
        type Output = ();
        #[inline(always)]
        unsafe fn run<S: Simd>(self) {
            // SAFETY: the tests give whole vectors.
            unsafe { self.0.apply::<S>(self.1, self.2) };
        }
    }

    /// The integral of the normal distribution's density up to `x`, by Simpson's rule.
    fn normal(x: f64) -> f64 {
        let steps = 2000;
        let h = x / f64::from(steps);
        let density = |t: f64| (-0.5 * t * t).exp() / (2.0 * std::f64::consts::PI).sqrt();
        let sum: f64 = (0..=steps)
            .map(|i| {
                let weight = if i == 0 || i == steps { 1.0 } else { f64::from(2 + 2 * (i % 2)) };
                weight * density(h * f64::from(i))
            })
            .sum();
        0.5 + sum * h / 3.0
    }

    #[test]
    fn functions_are_what_their_names_say() {
        let plain = |what: Activation, x: f64| match what {
            Activation::Silu => x / (1.0 + (-x).exp()),
            Activation::Gelu => x * normal(x),
            Activation::GeluTanh => {
                let y = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
                0.5 * x * (1.0 + y.tanh())
            }
            Activation::Relu => x.max(0.0),
        };
        let x: Vec<f32> = (-400..400).map(|i| i as f32 * 0.031).collect();
        let others: Vec<f32> = (0..x.len()).map(|i| (i as f32 * 0.7).sin()).collect();
        for isa in Isa::all() {
            for what in [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu] {
                for others in [None, Some(&others[..])] {
                    let mut got = x.clone();
                    isa.run(Apply(what, &mut got, others));
                    for (i, got) in got.iter().enumerate() {
                        let other = others.map_or(1.0, |o| f64::from(o[i]));
                        let want = plain(what, f64::from(x[i])) * other;
                        assert!((f64::from(*got) - want).abs() < 2e-6, "{isa} {what:?}({}) = {got}, not {want}", x[i]);
                    }
                }
                let mut lost = [f32::NAN; 16];
                isa.run(Apply(what, &mut lost, None));
                assert!(lost.iter().all(|v| v.is_nan()), "{isa} {what:?} hides what is no number");
            }
        }
    }
}
