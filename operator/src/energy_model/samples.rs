//! Sample EnergyModels of the tests: the model `demo` on candle on the CPU.

use joulecast_crds::EnergyModel;
use serde_json::json;

pub(crate) fn energy_model() -> EnergyModel {
    let interval =
        json!({"level": "0.9", "lower": "-1.7", "upper": "1.7", "scale": "0.03", "scaleSlope": "0", "scalePivot": "0"});
    serde_json::from_value(json!({
        "apiVersion": "joulecast.dev/v1alpha1", "kind": "EnergyModel",
        "metadata": {"name": "demo-candle-cpu", "uid": "em", "generation": 3, "resourceVersion": "7"},
        "spec": {
            "key": {"model": "demo", "artifactDigest": DIGEST, "dtype": "bf16", "engine": "candle",
                "engineVersion": "0.11", "provider": "cpu", "deviceClass": "cpu", "batch": 1},
            "fit": {
                "energy": {"terms": {"const": "0.5", "tin": "0.01", "tout": "0.1"}, "family": "linear", "sampleCount": 40,
                    "r2": "0.999", "cvMedianApe": "0.02", "interval": interval},
                "runtime": {"terms": {"const": "0.01", "tin": "0.001", "tout": "0.01"}, "family": "linear", "sampleCount": 40,
                    "cvMedianApe": "0.01", "interval": interval},
                "domain": {"tokensIn": {"min": 8, "max": 512}, "tokensOut": {"min": 8, "max": 256}, "batch": {"min": 1, "max": 1}},
                "samples": 40,
            },
            "provenance": {"source": "Measured", "meter": "rapl package-0"},
            "fittedAt": "2027-01-01T00:00:00Z",
        },
    }))
    .unwrap()
}

pub(crate) const DIGEST: &str = "files-sha256:0000000000000000000000000000000000000000000000000000000000000000";
