//! The GPU and the libraries that outcomes of trials depend on.

use std::path::Path;

use crate::cuda::system;
use crate::libtorch::{self, AttentionBackend};

/// Models and versions; `None` where they cannot be found without opening the GPU.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Machine {
    /// Model of the GPUs, if all are alike.
    pub gpu: Option<String>,
    pub driver: Option<String>,
    pub libtorch: Option<String>,
    pub cudnn: Option<String>,
}

impl Machine {
    /// Describes this machine.
    pub fn here() -> Self {
        let library = libtorch::library();
        let folder = library.as_deref().and_then(Path::parent);
        Machine {
            gpu: only(system::gpu_models()),
            driver: system::driver_version(),
            libtorch: library.as_deref().and_then(libtorch::version),
            cudnn: system::cudnn_version(folder),
        }
    }

    /// Returns one line that names everything; `None` if something is unknown, because outcomes of
    /// another machine could then be taken for this one's.
    pub fn key(&self) -> Option<String> {
        let Machine { gpu, driver, libtorch, cudnn } = self;
        let known = [gpu, driver, libtorch, cudnn].map(|part| {
            part.as_deref().filter(|part| *part != system::UNKNOWN && !part.contains('\n'))
        });
        let [Some(gpu), Some(driver), Some(libtorch), Some(cudnn)] = known else { return None };
        Some(format!("{gpu}; driver {driver}; libtorch {libtorch}; cuDNN {cudnn}"))
    }

    /// The library and version that a backend's kernels come from.
    pub fn library_of(&self, backend: AttentionBackend) -> String {
        let (name, version) = match backend {
            AttentionBackend::Cudnn => ("cuDNN", &self.cudnn),
            _ => ("libtorch", &self.libtorch),
        };
        format!("{name} {}", version.as_deref().unwrap_or("of unknown version"))
    }
}

/// Returns the model that all GPUs have.
fn only(models: Vec<String>) -> Option<String> {
    let first = models.first()?.clone();
    models.iter().all(|model| *model == first).then_some(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_that_is_not_fully_known_has_no_key() {
        let text = |word: &str| Some(word.to_string());
        let known = Machine {
            gpu: text("NVIDIA H200"),
            driver: text("580.65.06"),
            libtorch: text("2.13.0"),
            cudnn: text("9.20.0"),
        };
        let key = "NVIDIA H200; driver 580.65.06; libtorch 2.13.0; cuDNN 9.20.0";
        assert_eq!(known.key().as_deref(), Some(key));
        for unknown in [
            Machine { gpu: None, ..known.clone() },
            Machine { driver: text("unknown"), ..known.clone() },
            Machine { cudnn: None, ..known.clone() },
            Machine { libtorch: text("2\n13"), ..known.clone() },
        ] {
            assert_eq!(unknown.key(), None, "{unknown:?}");
        }
        assert_eq!(known.library_of(AttentionBackend::Cudnn), "cuDNN 9.20.0");
        assert_eq!(known.library_of(AttentionBackend::Flash), "libtorch 2.13.0");
    }

    #[test]
    fn a_machine_with_unlike_gpus_has_no_model() {
        let models = |names: &[&str]| only(names.iter().map(ToString::to_string).collect());
        assert_eq!(models(&["H100", "H100"]).as_deref(), Some("H100"));
        assert_eq!(models(&["A100", "H100"]), None);
        assert_eq!(models(&[]), None);
    }
}
