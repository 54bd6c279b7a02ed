//! Lists, maps from patterns, words and arrays of tables: read, refused, overridden and written.

use super::{GlobMap, choice, read, settings, write};
use crate::error::Error;

choice! {
    /// A layer.
    enum Layer {
        /// Attention.
        "attention" => Attention,
        /// Feed-forward.
        "mlp" => Mlp,
    }
}

settings! {
    struct Folder {
        /// Folder of samples.
        path: String = "data".into();
        /// Share of an epoch.
        share: f64 = 1.0, in 0.0..=1.0;
        /// Sizes in pixels.
        size: Size, as table;
    }
}

settings! {
    struct Size {
        /// Height.
        height: i64 = 64, in 1..;
    }
}

settings! {
    struct Tuning {
        /// Parts of the names of the layers
        /// that are tuned.
        ///
        /// Never printed in the listing.
        targets: Vec<String> = vec!["q".into(), "a \"b\"".into()];
        /// Learning rates.
        rates: Vec<f64> = vec![1e-4, 2.0], in 0.0..=2.0;
        /// Steps.
        steps: Vec<u64>, in 1..;
        /// Kinds of layers.
        layers: Vec<Layer> = vec![Layer::Mlp];
        /// The one kind.
        only: Option<Layer> = None;
        /// Ranks by pattern.
        ranks: GlobMap<i64> = GlobMap(vec![("z.*".into(), 4), ("a".into(), 8)]), in 1..=64;
        /// Scales by pattern.
        scales: GlobMap<f64>, in 0.0..;
        /// Folders.
        folders: Vec<Folder>, as tables;
    }
}

fn problems(text: &str, overrides: &[&str]) -> Vec<String> {
    let overrides: Vec<String> = overrides.iter().map(ToString::to_string).collect();
    match read(&mut Tuning::default(), "test", text, &overrides) {
        Err(Error::Config { problems, .. }) => problems.iter().map(ToString::to_string).collect(),
        other => panic!("{text} is refused: {other:?}"),
    }
}

fn tuning(text: &str, overrides: &[&str]) -> Tuning {
    let overrides: Vec<String> = overrides.iter().map(ToString::to_string).collect();
    let mut tuning = Tuning::default();
    read(&mut tuning, "test", text, &overrides).expect("sound settings");
    tuning
}

const DEFAULTS: &str = r#"# Parts of the names of the layers that are tuned.
targets = ["q", 'a "b"']
# Learning rates.
rates = [0.0001, 2.0]
# Steps.
steps = []
# Kinds of layers. One of: attention, mlp.
layers = ["mlp"]
# The one kind. One of: attention, mlp.
# only =
# Ranks by pattern.
ranks = { "z.*" = 4, "a" = 8 }
# Scales by pattern.
scales = {}

# Folders.
# [[folders]]
# Folder of samples.
# path = "data"
# Share of an epoch.
# share = 1.0

# Sizes in pixels.
# [folders.size]
# Height.
# height = 64
"#;

const FOLDERS: &str = r#"
# Folders.
[[folders]]
# Folder of samples.
path = "a"
# Share of an epoch.
share = 0.5

# Sizes in pixels.
[folders.size]
# Height.
height = 7

# Folders.
[[folders]]
# Folder of samples.
path = "data"
# Share of an epoch.
share = 1.0

# Sizes in pixels.
[folders.size]
# Height.
height = 64
"#;

#[test]
fn every_kind_is_listed_with_its_meaning_and_reads_back() {
    let mut defaults = Tuning::default();
    assert_eq!(write(&mut defaults), DEFAULTS);
    assert_eq!(tuning(DEFAULTS, &[]), defaults);

    let text = "[[folders]]\npath = 'a'\nshare = 0.5\nsize.height = 7\n[[folders]]\n";
    let mut two = tuning(text, &[]);
    let listing = write(&mut two);
    assert!(listing.ends_with(FOLDERS), "{listing}");
    assert_eq!(tuning(&listing, &[]), two);
}

#[test]
fn a_map_is_an_inline_table_or_a_table_and_keeps_its_order() {
    let expected = GlobMap(vec![("z.*".to_string(), 1), ("b".into(), 2), ("a.?".into(), 3)]);
    for text in
        ["ranks = { 'z.*' = 1, b = 2, 'a.?' = 3 }", "[ranks]\n'z.*' = 1\nb = 2\n\"a.?\" = 3"]
    {
        assert_eq!(tuning(text, &[]).ranks, expected, "{text}");
    }
    assert_eq!(tuning("ranks = {}", &[]).ranks, GlobMap::default());
}

#[test]
fn each_kind_can_be_overridden() {
    let text = "targets = ['k']\nranks = { 'z.*' = 1 }\n[[folders]]\npath = 'a'\n";
    let overridden = tuning(
        text,
        &[
            "targets=['v', 'o']",
            "rates=[1]",
            "steps=[3, 4]",
            "layers=['attention']",
            "only=mlp",
            "ranks.'y.*'=2",
            "ranks={'z.*'=3}",
            "scales={'a'=0.5}",
            "folders=[{path='b'}, {share=0.25, size={height=9}}]",
        ],
    );
    assert_eq!(overridden.targets, ["v", "o"]);
    assert_eq!((overridden.rates, overridden.steps), (vec![1.0], vec![3, 4]));
    assert_eq!((overridden.layers, overridden.only), (vec![Layer::Attention], Some(Layer::Mlp)));
    assert_eq!(overridden.ranks, GlobMap(vec![("z.*".into(), 3), ("y.*".into(), 2)]));
    assert_eq!(overridden.scales, GlobMap(vec![("a".into(), 0.5)]));
    let shown: Vec<_> =
        overridden.folders.iter().map(|f| (f.path.as_str(), f.share, f.size.height)).collect();
    assert_eq!(shown, [("b", 1.0, 64), ("data", 0.25, 9)]);
}

#[test]
fn every_part_that_does_not_fit_is_told_with_its_line() {
    let text = "targets = ['q',\n 3,\n true]\nrates = [3, nan, 1]\nsteps = [0, 'x']\n\
                layers = ['atention']\nonly = 'conv'\n\
                [ranks]\n'a.*' = 65\nb.c = 3\nd = 0.5\n\
                [[folders]]\npth = 'a'\n[[folders]]\nshare = 2\nsize.height = 0\n";
    assert_eq!(
        problems(text, &[]),
        [
            "targets[1] (line 2): expected a text in quotes, found the integer 3",
            "targets[2] (line 3): expected a text in quotes, found true",
            "rates[0] (line 4): 3 is out of range; must be at least 0 and at most 2",
            "rates[1] (line 4): NaN is not a finite number",
            "steps[0] (line 5): 0 is out of range; must be at least 1",
            "steps[1] (line 5): expected an integer, found the text \"x\"",
            "layers[0] (line 6): unknown value `atention`; did you mean `attention`?",
            "only (line 7): unknown value `conv`; expected one of attention, mlp",
            "ranks.\"a.*\" (line 9): 65 is out of range; must be at least 1 and at most 64",
            "ranks.\"b\" (line 10): found a table; put a pattern with dots in quotes",
            "ranks.\"d\" (line 11): expected an integer, found the number 0.5",
            "folders[1].share (line 15): 2 is out of range; must be at least 0 and at most 1",
            "folders[1].size.height (line 16): 0 is out of range; must be at least 1",
            "folders[0].pth (line 13): unknown key; did you mean folders[0].path?",
        ]
    );
}

#[test]
fn another_kind_in_place_of_several_is_refused() {
    assert_eq!(
        problems("targets = 'q'\nrates = 1\nranks = 4\n[folders]\npath = 'a'\n", &[]),
        [
            "targets (line 1): expected an array of texts, found the text \"q\"",
            "rates (line 2): expected an array of numbers, found the integer 1",
            "ranks (line 3): expected a table of integers, { \"pattern\" = … }, found the integer 4",
            "folders (line 4): expected an array of tables, [[folders]], found a table",
        ]
    );
    assert_eq!(
        problems("folders = 3\nlayers = [[1]]", &["steps=[1,-1]"]),
        [
            "steps[1] (--set): -1 is out of range; must be at least 1",
            "layers[0] (line 2): expected one of attention, mlp, found the array [1]",
            "folders (line 1): expected an array of tables, [[folders]], found the integer 3",
        ]
    );
    assert_eq!(
        problems("share = 1\n[[folders]]\n[[folders]]\n", &[]),
        ["share (line 1): unknown key; did you mean folders.share?"]
    );
    assert_eq!(
        problems("folders = [1, {}]", &[]),
        ["folders[0] (line 1): expected a table, [folders[0]], found the integer 1"]
    );
}
