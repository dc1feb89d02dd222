//! Numbers that stand in the API as strings: floats never do.

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::fmt;

/// A decimal number as text, for example "0.0213" or "1.5e-3"; at most 32 characters.
#[derive(Debug, Default, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Decimal(pub String);

/// What a [`Decimal`] looks like, as a regular expression.
pub const PATTERN: &str = r"^-?[0-9]{1,20}(\.[0-9]{1,20})?([eE][-+]?[0-9]{1,3})?$";

impl Decimal {
    /// A number with so many significant digits (1 to 17); `None` of one that is not finite.
    #[must_use]
    pub fn rounded(value: f64, digits: usize) -> Option<Self> {
        if !value.is_finite() {
            return None;
        }
        let text = format!("{value:.*e}", digits.clamp(1, 17) - 1);
        let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let mantissa =
            if mantissa.contains('.') { mantissa.trim_end_matches('0').trim_end_matches('.') } else { mantissa };
        Some(Self(if exponent == "0" { mantissa.to_owned() } else { format!("{mantissa}e{exponent}") }))
    }

    /// The number; `None` where the text is none or not finite.
    #[must_use]
    pub fn value(&self) -> Option<f64> {
        let plain = self.0.bytes().all(|byte| byte.is_ascii_digit() || b"+-.eE".contains(&byte));
        self.0.parse().ok().filter(|value: &f64| plain && value.is_finite())
    }
}

impl fmt::Display for Decimal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl JsonSchema for Decimal {
    fn schema_name() -> Cow<'static, str> {
        "Decimal".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "string", "maxLength": 32, "pattern": PATTERN})
    }
}

/// Schema of a fraction from 0 to 1 as text, for a field of type `String`. A rule in place of a pattern: its refusal says what to write.
pub(crate) fn fraction(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "string",
        "maxLength": 11,
        "x-kubernetes-validations": [{
            "rule": r"self.matches('^(0(\\.[0-9]{1,9})?|1(\\.0{1,9})?)$')",
            "message": "give a fraction from 0 to 1 as text, with at most 9 decimals, for example \"0.25\""
        }]
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_short_and_read_back() {
        for (value, digits, text) in [
            (0.0, 10, "0"),
            (1.5, 10, "1.5"),
            (0.0015, 10, "1.5e-3"),
            (123_456.789, 4, "1.235e5"),
            (-2.0, 3, "-2"),
            (1e300, 10, "1e300"),
        ] {
            let decimal = Decimal::rounded(value, digits).unwrap();
            assert_eq!(decimal.0, text);
            assert!((decimal.value().unwrap() - value).abs() <= value.abs() * 1e-3);
        }
        assert_eq!(Decimal::rounded(f64::NAN, 3), None);
        let exact = 0.1 + 0.2;
        assert_eq!(Decimal::rounded(exact, 17).unwrap().value(), Some(exact));
        assert!(Decimal::rounded(-1.234_567_890_123_456_7e-300, 17).unwrap().0.len() <= 32);
    }

    #[test]
    fn what_is_no_number_has_no_value() {
        for text in ["", "x", "inf", "NaN", "1e999", "0x1", "1 "] {
            assert_eq!(Decimal(text.into()).value(), None, "{text:?}");
        }
    }
}
