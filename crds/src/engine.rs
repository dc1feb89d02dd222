//! The axes along which a configuration is chosen: artifact format, engine, execution provider, device class.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

macro_rules! named_enum {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $text:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
        pub enum $name { $($(#[$vdoc])* #[serde(rename = $text)] $variant),+ }

        impl $name {
            /// All values, in their order.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The name as it stands in manifests and on command lines.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text),+ }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.as_str())
            }
        }

        impl FromStr for $name {
            type Err = String;
            fn from_str(text: &str) -> Result<Self, String> {
                Self::ALL.iter().copied().find(|value| value.as_str() == text).ok_or_else(|| {
                    format!("{text:?} is not one of {}", Self::ALL.iter().map(|v| v.as_str()).collect::<Vec<_>>().join(", "))
                })
            }
        }
    };
}

named_enum! {
    /// An inference engine: the software that computes the model.
    EngineName {
        /// candle, Rust.
        Candle = "candle",
        /// ONNX Runtime.
        Onnx = "onnx",
        /// OpenVINO.
        Openvino = "openvino",
        /// libtorch with weights in safetensors.
        Torch = "torch",
        /// libtorch with a TorchScript module.
        Torchscript = "torchscript",
        /// llama.cpp.
        Llamacpp = "llamacpp",
    }
}

named_enum! {
    /// An execution provider: what the engine computes on.
    Provider {
        /// The CPU.
        Cpu = "cpu",
        /// An NVIDIA GPU.
        Cuda = "cuda",
        /// OpenVINO as a provider of ONNX Runtime.
        Openvino = "openvino",
    }
}

named_enum! {
    /// A class of nodes by what their slots are.
    DeviceClass {
        /// CPU packages.
        Cpu = "cpu",
        /// NVIDIA GPUs.
        Cuda = "cuda",
    }
}

named_enum! {
    /// File format of a model artifact.
    ArtifactFormat {
        /// A Hugging Face directory: config.json, safetensors, tokenizer.json.
        Safetensors = "safetensors",
        /// GGUF of llama.cpp.
        Gguf = "gguf",
        /// ONNX with explicit KV cache.
        Onnx = "onnx",
        /// TorchScript module.
        Torchscript = "torchscript",
        /// OpenVINO IR.
        Openvino = "openvino",
    }
}

impl EngineName {
    /// The artifact formats that this engine reads, the preferred one first.
    #[must_use]
    pub fn formats(self) -> &'static [ArtifactFormat] {
        match self {
            Self::Candle => &[ArtifactFormat::Safetensors, ArtifactFormat::Gguf],
            Self::Onnx => &[ArtifactFormat::Onnx],
            Self::Openvino => &[ArtifactFormat::Openvino],
            Self::Torch => &[ArtifactFormat::Safetensors],
            Self::Torchscript => &[ArtifactFormat::Torchscript],
            Self::Llamacpp => &[ArtifactFormat::Gguf],
        }
    }

    /// The execution providers that this engine knows.
    #[must_use]
    pub fn providers(self) -> &'static [Provider] {
        match self {
            Self::Candle | Self::Torch | Self::Torchscript | Self::Llamacpp => &[Provider::Cpu, Provider::Cuda],
            Self::Onnx => &[Provider::Cpu, Provider::Cuda, Provider::Openvino],
            Self::Openvino => &[Provider::Cpu],
        }
    }
}

impl Provider {
    /// The class of nodes that this provider needs.
    #[must_use]
    pub fn device_class(self) -> DeviceClass {
        match self {
            Self::Cpu | Self::Openvino => DeviceClass::Cpu,
            Self::Cuda => DeviceClass::Cuda,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_read_back_and_unknown_ones_name_the_known() {
        for engine in EngineName::ALL {
            assert_eq!(engine.as_str().parse::<EngineName>().unwrap(), *engine);
            assert_eq!(serde_json::to_value(engine).unwrap(), engine.as_str());
            assert!(!engine.formats().is_empty() && !engine.providers().is_empty());
        }
        let error = "tensorrt".parse::<EngineName>().unwrap_err();
        assert!(error.contains("tensorrt") && error.contains("llamacpp"), "{error}");
    }
}
