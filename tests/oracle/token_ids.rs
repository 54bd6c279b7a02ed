//! Token ids are those of transformers, for tokenizers of every kind and every published layout;
//! the texts that are tokenized are those of diffusers' pipelines.

use std::collections::BTreeMap;
use std::path::Path;

use fm_dist::tokenizer::Tokenizer;
use fm_dist::tokenizer::prompt::{
    Templated, flux2_dev, flux2_klein, hunyuan_video15, quoted_texts, qwen_image, wan,
};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tempfile::TempDir;

use super::packages::{fresh_seed, oracle};

#[derive(Deserialize)]
struct Answer {
    prompts: Vec<String>,
    lengths: Vec<usize>,
    cases: BTreeMap<String, Case>,
}

#[derive(Deserialize)]
struct Case {
    /// Ids by length and prompt.
    ids: Vec<Vec<Vec<i64>>>,
    pad: i64,
    pads_left: bool,
}

fn answer<T: DeserializeOwned>(script: &str, folder: &Path, file: &str) -> T {
    oracle(script, &[folder.to_str().unwrap(), &fresh_seed(script)]);
    serde_json::from_slice(&std::fs::read(folder.join(file)).unwrap()).unwrap()
}

/// Panics with the first prompt whose ids differ.
fn assert_equal(tokenizer: &Tokenizer, case: &Case, answer: &Answer, name: &str) {
    for (most, expected) in answer.lengths.iter().zip(&case.ids) {
        assert_eq!(expected.len(), answer.prompts.len(), "{name}");
        for (prompt, expected) in answer.prompts.iter().zip(expected) {
            let found = tokenizer.ids(prompt, *most);
            assert_eq!(&found, expected, "{name}, at most {most} ids of {prompt:?}");
        }
    }
    assert_eq!(tokenizer.pad_id(), case.pad, "{name}");
    assert_eq!(tokenizer.pads_left(), case.pads_left, "{name}");
}

#[test]
fn token_ids_are_those_of_transformers_in_every_published_layout() {
    let folder = TempDir::new().unwrap();
    let answer: Answer = answer("token_ids.py", folder.path(), "ids.json");
    assert_eq!((answer.prompts.len(), answer.cases.len()), (1000, 30));
    for (name, case) in &answer.cases {
        let tokenizer = Tokenizer::open(&folder.path().join(name)).unwrap();
        assert_equal(&tokenizer, case, &answer, name);
    }
}

type Chat = fn(&str) -> Templated;

const CHATS: [(&str, Chat); 4] = [
    ("flux2", flux2_dev),
    ("flux2_klein", flux2_klein),
    ("qwen_image", qwen_image),
    ("hunyuan_video15", hunyuan_video15),
];

#[derive(Deserialize)]
struct Texts {
    prompts: Vec<String>,
    wan: Vec<String>,
    quoted: Vec<Option<String>>,
    /// Texts of chats by family.
    chats: BTreeMap<String, Vec<String>>,
    /// Ids of those chats by family, at most `most`.
    ids: BTreeMap<String, Vec<Vec<i64>>>,
    dropped: BTreeMap<String, usize>,
    most: usize,
}

#[test]
fn texts_of_prompts_are_those_of_diffusers() {
    let folder = TempDir::new().unwrap();
    let texts: Texts = answer("prompt_texts.py", folder.path(), "texts.json");
    for ((prompt, cleaned), quoted) in texts.prompts.iter().zip(&texts.wan).zip(&texts.quoted) {
        assert_eq!(&wan(prompt), cleaned, "{prompt:?}");
        assert_eq!(&quoted_texts(prompt), quoted, "{prompt:?}");
    }
    assert_eq!(texts.chats.len(), CHATS.len());
    for (family, chat) in CHATS {
        let tokenizer = Tokenizer::open(&folder.path().join(family)).unwrap();
        let expected = texts.chats[family].iter().zip(&texts.ids[family]);
        for (prompt, (text, ids)) in texts.prompts.iter().zip(expected) {
            let found = chat(prompt);
            assert_eq!(&found.text, text, "{family}: {prompt:?}");
            assert_eq!(&found.ids(&tokenizer, texts.most), ids, "{family}: {prompt:?}");
            assert_eq!(found.dropped, texts.dropped[family], "{family}");
        }
    }
}
