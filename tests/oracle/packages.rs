//! The oracle: scripts of tests/oracle run the real packages in Python; how close is close enough.

use std::path::Path;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::Value;
use tch::{Kind, Tensor};

/// Sums of a few thousand f32 numbers in another order.
pub const LOSS: f64 = 2e-5;
/// The same through a few layers of a small transformer and back.
pub const GRADIENT: f64 = 2e-4;
/// bfloat16 keeps 8 bits: losses and gradients, relative to their norm.
pub const BFLOAT16: (f64, f64) = (2e-2, 6e-2);

/// Runs a script of tests/oracle in the environment that the tests' set-up makes.
pub fn oracle(script: &str, arguments: &[&str]) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let python = root.join(".deps/oracle/bin/python");
    assert!(python.exists(), "{} is missing: run launch/setup.sh --oracle", python.display());
    let output = Command::new(python)
        .arg(root.join("tests/oracle").join(script))
        .args(arguments)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{script} {arguments:?}:\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// A new seed each run, or that of `FM_DIST_TEST_SEED`; it is printed, so that a failure can be had
/// again.
pub fn fresh_seed(what: &str) -> String {
    let fresh = || {
        let nanoseconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos();
        (nanoseconds % 1_000_000_000).to_string()
    };
    let seed = std::env::var("FM_DIST_TEST_SEED").unwrap_or_else(|_| fresh());
    println!("{what}: FM_DIST_TEST_SEED={seed}");
    seed
}

pub fn entries(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// ‖found − expected‖ / ‖expected‖.
pub fn relative_difference(found: &Tensor, expected: &Tensor) -> f64 {
    let (found, expected) = (found.to_kind(Kind::Double), expected.to_kind(Kind::Double));
    (&found - &expected).norm().double_value(&[]) / expected.norm().double_value(&[]).max(1e-12)
}

pub fn assert_close(found: &Tensor, expected: &Tensor, tolerance: f64, what: &str) {
    assert_eq!(found.size(), expected.size(), "{what}");
    let difference = relative_difference(found, expected);
    assert!(
        difference <= tolerance,
        "{what}: ‖difference‖ is {difference:e} of ‖expected‖, allowed {tolerance:e}"
    );
}

/// Holds a tensor of a case to the other side's. In bfloat16 each side is as far from what float32
/// gives as rounding takes it, its own way, so that two sound ones can be farther apart than the
/// tolerance (in 7 of some 50 cases, by a factor of 4 where norms of tokens without conditions
/// enlarge rounding). Then our distance from float32 may be twice theirs and the tolerance.
pub fn assert_as_good(
    [found, expected]: [&Tensor; 2],
    exact: Option<&Tensor>,
    tolerance: f64,
    what: &str,
) {
    match exact {
        Some(exact) if relative_difference(found, expected) > tolerance => {
            let theirs = relative_difference(expected, exact);
            assert_close(found, exact, 2.0 * theirs + tolerance, what);
        }
        _ => assert_close(found, expected, tolerance, what),
    }
}

/// Equal, or neighbouring f32 numbers.
pub fn assert_within_one_ulp(found: &Tensor, expected: &Tensor, what: &str) {
    assert_eq!(found.size(), expected.size(), "{what}");
    let ordered = |tensor: &Tensor| {
        let bits = |value: f32| {
            (value.to_bits() & 0x7fff_ffff) as i64 * if value.is_sign_negative() { -1 } else { 1 }
        };
        Vec::<f32>::try_from(tensor.flatten(0, -1).to_kind(Kind::Float))
            .unwrap()
            .into_iter()
            .map(bits)
            .collect::<Vec<_>>()
    };
    for (a, b) in ordered(found).into_iter().zip(ordered(expected)) {
        assert!((a - b).abs() <= 1, "{what}: {} units in the last place apart", (a - b).abs());
    }
}
