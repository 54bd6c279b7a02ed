//! Reading and writing of small tables.

use super::*;

settings! {
    struct Inner {
        /// Step size.
        learning_rate: f64 = 0.0, in 0.0..;
    }
}

settings! {
    struct Outer {
        /// Number of steps.
        steps: u64 = 0, in 1..;
        /// Name of the run.
        name: String = String::new();
        /// Most steps.
        limit: Option<usize> = None, in 0..;
        /// Training.
        train: Inner, as table;
    }
}

fn problems(text: &str, overrides: &[&str]) -> Vec<String> {
    let overrides: Vec<String> = overrides.iter().map(ToString::to_string).collect();
    match read(&mut Outer::default(), "test", text, &overrides) {
        Err(Error::Config { problems, .. }) => problems.iter().map(ToString::to_string).collect(),
        Err(other) => panic!("{other}"),
        Ok(()) => Vec::new(),
    }
}

#[test]
fn what_is_written_reads_back() {
    let train = Inner { learning_rate: 1e-4 };
    let mut outer = Outer { steps: 3, name: "a \"b\"".into(), limit: None, train };
    let text = write(&mut outer);
    let mut back = Outer::default();
    read(&mut back, "test", &text, &[]).expect("own text is valid");
    assert_eq!(back, outer);
}

#[test]
fn all_problems_come_at_once_with_line_and_nearest_name() {
    let found = problems("steps = 0\nnme = 'x'\n[train]\nlerning_rate = 1.0\n", &[]);
    assert_eq!(
        found,
        [
            "steps (line 1): 0 is out of range; must be at least 1",
            "train.lerning_rate (line 4): unknown key; did you mean train.learning_rate?",
            "nme (line 2): unknown key; did you mean name?",
        ]
    );
}

#[test]
fn a_key_in_the_wrong_table_is_sent_home() {
    assert_eq!(
        problems("learning_rate = 1.0", &[]),
        ["learning_rate (line 1): unknown key; did you mean train.learning_rate?"]
    );
}

#[test]
fn bounds_are_told_as_people_write_them() {
    settings! {
        struct Bounds {
            /// Above zero.
            positive: f64, in above(0.0);
            /// At most a half.
            share: f64, in above_up_to(1e-9, 0.5);
        }
    }
    let said = |text: &str| {
        read(&mut Bounds::default(), "test", text, &[]).expect_err("out of range").to_string()
    };
    assert_eq!(said("positive = 0"), "test: positive (line 1): 0 is out of range; must be above 0");
    assert_eq!(
        said("positive = -1e-300"),
        "test: positive (line 1): -1e-300 is out of range; must be above 0"
    );
    assert_eq!(
        said("share = 0.75"),
        "test: share (line 1): 0.75 is out of range; must be above 1e-9 and at most 0.5"
    );
    assert_eq!(
        said("share = 123456"),
        "test: share (line 1): 123456 is out of range; must be above 1e-9 and at most 0.5"
    );
}

#[test]
fn overrides_win_and_are_named_in_errors() {
    let mut outer = Outer::default();
    read(
        &mut outer,
        "test",
        "steps = 3",
        &["steps=4".into(), "name=runs/x".into(), "train.learning_rate = 2".into()],
    )
    .expect("valid");
    assert_eq!((outer.steps, outer.name.as_str(), outer.train.learning_rate), (4, "runs/x", 2.0));
    assert_eq!(
        problems("", &["steps=many"]),
        ["steps (--set): expected an integer, found the text \"many\""]
    );
    assert_eq!(problems("", &["steps"]), ["steps (--set): expected key.path=value"]);
}

#[test]
fn a_text_that_is_no_configuration_is_refused_unread() {
    let comment = "#".repeat(MAX_BYTES);
    assert!(
        problems(&comment, &["steps"])[0]
            .ends_with("is 49157 bytes long with its overrides, longer than the 49152 allowed")
    );
    assert_eq!(problems(&comment[8..], &["steps"]), ["steps (--set): expected key.path=value"]);
}

#[test]
fn not_a_number_and_duplicates_are_refused() {
    assert_eq!(
        problems("[train]\nlearning_rate = nan", &[]),
        ["train.learning_rate (line 2): NaN is not a finite number"]
    );
    assert_eq!(problems("steps = 1\nsteps = 2", &[]), ["steps (line 2): duplicate key"]);
    assert_eq!(
        problems("steps = 1e99", &[]),
        ["steps (line 1): expected an integer, found the number 1e99"]
    );
}
