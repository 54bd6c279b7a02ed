//! The program prints the documented listing of all settings.

use std::fs;
use std::path::Path;

use crate::runs::{finish, program};

#[test]
fn the_printed_configuration_is_the_documented_one() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/config.toml");
    let (code, printed, errors) = finish(program(&["config"]));
    assert_eq!(code, 0, "{errors}");
    let documented = fs::read_to_string(&golden).unwrap_or_default();
    assert!(
        printed == documented,
        "the listing changed; if it should, write it anew: fm-dist config > {}",
        golden.display()
    );
}
