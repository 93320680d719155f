//! `lorad keys` as the keeper of a server runs it.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

use super::stderr;

fn keys(data_dir: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lorad"));
    command.arg("keys").args(arguments).arg("--data-dir").arg(data_dir).current_dir(data_dir);
    command.output().expect("a process")
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{}", stderr(output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn a_key_is_told_once_and_revoked_by_its_id() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let data_dir = folder.path();
    let made = keys(data_dir, &["create", "--name", "ci", "--owner", "team-a", "--scope", "read"]);
    let key = stdout(&made);
    let key = key.trim_end();
    assert!(key.starts_with("sk-lorad-") && key.len() > 40 && !key.contains('\n'), "{key}");
    assert!(!stderr(&made).contains(key));

    let list = stdout(&keys(data_dir, &["list"]));
    assert!(!list.contains(key) && list.contains(&key[key.len() - 4..]), "{list}");
    let listed: Value = serde_json::from_str(&stdout(&keys(data_dir, &["list", "--json"]))).expect("JSON");
    assert_eq!((&listed[0]["owner"], &listed[0]["scope"]), (&"team-a".into(), &"read".into()));
    let database = std::fs::read(data_dir.join("lorad.db")).expect("a database");
    assert!(!String::from_utf8_lossy(&database).contains(key), "the database has only its hash");

    let id = listed[0]["id"].as_str().expect("an id");
    stdout(&keys(data_dir, &["revoke", id]));
    let listed: Value = serde_json::from_str(&stdout(&keys(data_dir, &["list", "--json"]))).expect("JSON");
    assert!(listed[0]["revoked_at"].is_i64(), "{listed}");
}

#[test]
fn what_cannot_be_a_key_is_named() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for (arguments, words) in [
        (&["list"][..], "there is no database"),
        (&["create", "--name", "a", "--owner", "a/b"], "a/b"),
        (&["create", "--name", "", "--owner", "a"], "name must"),
        (&["create", "--name", "a", "--scope", "root"], "root"),
        (&["revoke", "key_1"], "key_1"),
    ] {
        let refused = keys(folder.path(), arguments);
        assert!(!refused.status.success() && stderr(&refused).contains(words), "{arguments:?}: {}", stderr(&refused));
    }
    stdout(&keys(folder.path(), &["create", "--name", "a"]));
    let unknown = format!("key_{}", "0".repeat(32));
    let refused = keys(folder.path(), &["revoke", &unknown]);
    assert!(stderr(&refused).contains(&unknown), "{}", stderr(&refused));
}
