//! What the store promises, on a real folder.

#![allow(clippy::unwrap_used)]

use a3s_box_store::Store;
use serde::{Deserialize, Serialize};
use std::{fs, path::Path};

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Pod {
    name: String,
}

fn pod(name: &str) -> Pod {
    Pod { name: name.to_owned() }
}

fn store() -> (tempfile::TempDir, Store) {
    let root = tempfile::tempdir().unwrap();
    let store = Store::open(root.path()).unwrap();
    (root, store)
}

fn names(store: &Store) -> Vec<String> {
    store.scan().unwrap().into_keys().collect()
}

#[test]
fn what_was_put_is_found_again_by_the_next_process() {
    let (root, store) = store();
    store.put("a", "sandbox", &pod("web")).unwrap();
    store.put("a", "container-1", &pod("nginx")).unwrap();
    store.put("a", "sandbox", &pod("web2")).unwrap();
    let again = Store::open(root.path()).unwrap().scan().unwrap();
    assert_eq!(again["a"].get::<Pod>("sandbox").unwrap().unwrap(), pod("web2"));
    assert_eq!(again["a"].get::<Pod>("container-1").unwrap().unwrap(), pod("nginx"));
    assert!(again["a"].get::<Pod>("other").is_none());
}

#[test]
fn removing_takes_the_whole_folder_and_may_be_repeated() {
    let (_root, store) = store();
    store.put("a", "sandbox", &pod("web")).unwrap();
    fs::write(store.folder("a").unwrap().join("disk.ext4"), "data").unwrap();
    store.remove_record("a", "sandbox").unwrap();
    store.remove_record("a", "sandbox").unwrap();
    store.remove("a").unwrap();
    store.remove("a").unwrap();
    assert_eq!(names(&store), Vec::<String>::new());
}

#[test]
fn a_removal_that_a_crash_interrupted_is_finished_at_the_next_start() {
    let (root, store) = store();
    store.put("a", "sandbox", &pod("web")).unwrap();
    fs::rename(root.path().join("a"), root.path().join(".removed/a")).unwrap();
    let store = Store::open(root.path()).unwrap();
    assert_eq!(names(&store), Vec::<String>::new());
    assert!(!root.path().join(".removed/a").exists());
}

#[test]
fn damaged_and_unknown_records_are_set_aside_and_never_deleted() {
    for damage in ["", "{", "{\"version\":2,\"record\":{}}", "{\"version\":1}", "\u{0}\u{0}"] {
        let (root, store) = store();
        store.put("a", "sandbox", &pod("web")).unwrap();
        store.put("a", "container-1", &pod("nginx")).unwrap();
        fs::write(root.path().join("a/sandbox.json"), damage).unwrap();
        let object = store.scan().unwrap().remove("a").unwrap();
        assert_eq!(object.set_aside, ["sandbox"], "{damage:?}");
        assert!(object.get::<Pod>("container-1").unwrap().is_ok());
        assert_eq!(kept(root.path(), "sandbox.json"), damage);
        // The next scan still says so, though the file is no longer in the object's folder.
        assert_eq!(store.scan().unwrap()["a"].set_aside, ["sandbox"]);
    }
}

#[test]
fn a_second_damaged_record_does_not_overwrite_the_first() {
    let (root, store) = store();
    for damage in ["first", "second"] {
        store.put("a", "sandbox", &pod("web")).unwrap();
        fs::write(root.path().join("a/sandbox.json"), damage).unwrap();
        store.scan().unwrap();
    }
    assert_eq!(kept(root.path(), "sandbox.json"), "first");
    assert_eq!(kept(root.path(), "sandbox.json.1"), "second");
}

#[test]
fn a_crash_while_writing_leaves_the_old_record() {
    let (root, store) = store();
    store.put("a", "sandbox", &pod("web")).unwrap();
    fs::write(root.path().join("a/sandbox.json.tmp"), "{\"vers").unwrap();
    let object = store.scan().unwrap().remove("a").unwrap();
    assert_eq!(object.get::<Pod>("sandbox").unwrap().unwrap(), pod("web"));
    assert!(!root.path().join("a/sandbox.json.tmp").exists());
}

#[test]
fn a_name_that_leaves_the_folder_is_refused() {
    let (_root, store) = store();
    for bad in ["", ".", "..", ".quarantine", "a/b", "../x", "a\0"] {
        assert!(store.put(bad, "sandbox", &pod("x")).is_err(), "{bad:?}");
        assert!(store.put("a", bad, &pod("x")).is_err(), "{bad:?}");
        assert!(store.remove(bad).is_err(), "{bad:?}");
    }
}

fn kept(root: &Path, name: &str) -> String {
    fs::read_to_string(root.join(".quarantine/a").join(name)).unwrap()
}
