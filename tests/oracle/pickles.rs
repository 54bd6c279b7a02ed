//! What `torch.save` writes: the parser of pickles reads it, and so does the command that the
//! refusal of a pickle prints.

use std::path::Path;
use std::process::Command;

use fm_dist::files::pickle::{PickledFile, Value};
use fm_dist::files::safetensors::SafeTensors;
use fm_dist::tensor::bytes;
use tch::{Kind, Tensor};

use super::packages::oracle;
use crate::fast::hostile::refusal;

/// Runs the command that a refusal prints, with the oracle's Python.
fn convert(refusal: &str, from: &Path, to: &Path) -> SafeTensors {
    let command = refusal.split_once("convert it once: ").expect("a command").1;
    let command = command
        .replace("IN.pt", from.to_str().unwrap())
        .replace("OUT.safetensors", to.to_str().unwrap());
    let python = Path::new(env!("CARGO_MANIFEST_DIR")).join(".deps/oracle/bin");
    let path = format!("{}:{}", python.display(), std::env::var("PATH").unwrap());
    let output = Command::new("sh").args(["-c", &command]).env("PATH", path).output().unwrap();
    assert!(output.status.success(), "{command}:\n{}", String::from_utf8_lossy(&output.stderr));
    SafeTensors::open(to).unwrap()
}

#[test]
fn d14_the_command_that_is_printed_converts_what_torch_save_wrote() {
    let folder = tempfile::tempdir().unwrap();
    oracle("pickles.py", &[folder.path().to_str().unwrap()]);
    for name in ["cache.pt", "cache.meta", "legacy.pt", "bare.pt"] {
        let from = folder.path().join(name);
        let text = refusal(|| SafeTensors::open(&from));
        assert!(text.contains("is a pickle") && text.contains("which can run code"), "{text}");
        let file = convert(&text, &from, &folder.path().join("out.safetensors"));
        let numbers = |name: &str| {
            Vec::<f32>::try_from(file.read(name).unwrap().flatten(0, -1).to_kind(tch::Kind::Float))
                .unwrap()
        };
        let mut names: Vec<&str> = file.tensors().iter().map(|info| info.name.as_str()).collect();
        names.sort_unstable();
        if name == "bare.pt" {
            assert_eq!(
                (names, numbers("tensor")),
                (vec!["tensor"], vec![0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
            );
            continue;
        }
        let expected = [
            "by_place.first_second",
            "by_place.list.0",
            "by_place.list.2.0",
            "latent",
            "learned",
            "turned",
            "view",
        ];
        assert_eq!(names, expected);
        assert_eq!(
            (numbers("turned"), numbers("view")),
            (vec![0.0, 3.0, 1.0, 4.0, 2.0, 5.0], vec![2.0, 3.0])
        );
        assert_eq!((numbers("by_place.list.2.0"), numbers("learned")), (vec![2.0], vec![1.0, 1.0]));
    }
}

#[test]
fn what_torch_save_wrote_is_parsed_to_the_same_values() {
    let folder = tempfile::tempdir().unwrap();
    oracle("pickles.py", &[folder.path().to_str().unwrap()]);
    let path = |name: &str| folder.path().join(name);
    for name in ["cache.pt", "cache.meta"] {
        let file = PickledFile::open(path(name)).unwrap();
        let root = file.root();
        let numbers = |value: &Value| {
            let tensor = file.read(value.tensor().unwrap()).unwrap();
            Vec::<f32>::try_from(tensor.flatten(0, -1).to_kind(tch::Kind::Float)).unwrap()
        };
        assert_eq!(root.get("prompt").and_then(Value::text), Some("a cat"));
        assert_eq!(root.get("crop_offset"), Some(&Value::List(vec![Value::Int(0), Value::Int(8)])));
        assert_eq!(root.get("nothing"), Some(&Value::None));
        let [latent, turned, view, learned] =
            ["latent", "turned", "view", "learned"].map(|key| root.get(key).unwrap());
        assert_eq!(latent.tensor().unwrap().shape, [1, 2, 3]);
        assert_eq!(numbers(latent), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
        assert_eq!(numbers(turned), [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]);
        assert_eq!((numbers(view), numbers(learned)), (vec![2.0, 3.0], vec![1.0, 1.0]));
        let Some(Value::List(list)) = root.get("by place").unwrap().get("list") else { panic!() };
        assert_eq!(list[1].text(), Some("text"));
        assert_eq!(numbers(&list[0]), [0.0]);
    }
    let bare = PickledFile::open(path("bare.pt")).unwrap();
    let tensor = bare.read(bare.root().tensor().unwrap()).unwrap();
    assert!(tensor.equal(&Tensor::from_slice(&[0f32, 1.0, 2.0, 3.0, 4.0, 5.0])));
    let (pickled, plain) = (
        PickledFile::open(path("kinds.pt")).unwrap(),
        SafeTensors::open(path("kinds.safetensors")).unwrap(),
    );
    assert_eq!(plain.tensors().len(), 10);
    for info in plain.tensors() {
        let tensor = pickled.root().get(&info.name).unwrap().tensor().unwrap();
        let (read, expected) = (pickled.read(tensor).unwrap(), plain.read(&info.name).unwrap());
        assert_eq!((read.kind(), read.size()), (info.kind, info.shape.clone()));
        assert!(read.equal(&expected), "{}", info.name);
    }
    let (pickled, plain) = (
        PickledFile::open(path("eights.pt")).unwrap(),
        SafeTensors::open(path("eights.safetensors")).unwrap(),
    );
    for (name, kind) in [("float8_e4m3fn", Kind::Float8e4m3fn), ("float8_e5m2", Kind::Float8e5m2)] {
        let tensor = pickled.root().get(name).unwrap().tensor().unwrap();
        let (read, expected) = (pickled.read(tensor).unwrap(), plain.read(name).unwrap());
        assert_eq!((read.kind(), read.size()), (kind, expected.size()));
        assert_eq!(bytes(&read), bytes(&expected), "{name}");
    }
    assert!(
        refusal(|| PickledFile::open(path("legacy.pt"))).contains("torch before 1.6"),
        "another format"
    );
}
