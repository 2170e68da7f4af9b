//! Folders that a layer uses without describing them keep what a lower layer said.
//!
//! An archive may bring `etc/x` and say nothing about `etc`. Unpacked on its own that folder has default
//! attributes, and overlay shows those of the highest layer. So where a lower layer described the folder,
//! one more layer on top, with nothing but such folders, says it again.

use crate::{
    path::{ancestors, is_below},
    unpack::{Attributes, Summary, Tree, UnpackError},
};
use std::{collections::BTreeMap, path::Path};

/// Folders with the attributes that the stack would hide, and all that lead to them.
pub(crate) type Parents = BTreeMap<String, Attributes>;

/// What is to be said again on top of these layers, lowest first. Mostly nothing.
pub(crate) fn hidden<'a>(layers: impl IntoIterator<Item = &'a Summary>) -> Parents {
    // Attributes as they should be, and whether the highest layer with the folder says so itself.
    let mut folders: BTreeMap<&str, (Attributes, bool)> = BTreeMap::new();
    for layer in layers {
        let emptied = |path: &str| {
            let gone = |top: &String| is_below(path.as_bytes(), top.as_bytes());
            layer.deleted.iter().any(|top| top == path || gone(top))
                || layer.opaque.iter().any(gone)
        };
        if !layer.deleted.is_empty() || !layer.opaque.is_empty() {
            folders.retain(|path, _| !emptied(path));
        }
        for path in &layer.implied {
            let known = folders.entry(path).or_insert_with(|| (Attributes::implied(), true));
            known.1 = known.0 == Attributes::implied();
        }
        for (path, attributes) in &layer.described {
            folders.insert(path, (attributes.clone(), true));
        }
    }
    let mut parents = Parents::new();
    for (path, (_, shown)) in &folders {
        // The guest decides about the root itself.
        if *shown || path.is_empty() {
            continue;
        }
        for path in ancestors(path).chain([*path]) {
            if let Some((attributes, _)) = folders.get(path) {
                parents.insert(path.to_owned(), attributes.clone());
            }
        }
    }
    parents
}

/// Makes the folders in `folder`, which is empty.
pub(crate) fn make(parents: &Parents, folder: &Path) -> Result<(), UnpackError> {
    let mut tree = Tree::open(folder)?;
    for (path, attributes) in parents {
        tree.folder(path, attributes.clone())?;
    }
    tree.finish()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(described: &[(&str, u32)], implied: &[&str], deleted: &[&str]) -> Summary {
        let attributes = |mode| Attributes { mode, ..Attributes::implied() };
        Summary {
            described: described
                .iter()
                .map(|(path, mode)| ((*path).to_owned(), attributes(*mode)))
                .collect(),
            implied: implied.iter().map(|&path| path.to_owned()).collect(),
            deleted: deleted.iter().map(|&path| path.to_owned()).collect(),
            ..Summary::default()
        }
    }

    fn modes(layers: &[Summary]) -> Vec<(String, u32)> {
        hidden(layers).into_iter().map(|(path, attributes)| (path, attributes.mode)).collect()
    }

    #[test]
    fn a_folder_that_is_only_used_keeps_its_attributes() {
        let base = layer(&[("a", 0o750), ("a/b", 0o1777), ("c", 0o755)], &[], &[]);
        let used = layer(&[], &["a", "a/b", "c", "d"], &[]);
        let said = layer(&[("a/b", 0o700)], &["a"], &[]);
        let expected = [("a".to_owned(), 0o750), ("a/b".to_owned(), 0o1777)];
        assert_eq!(modes(&[base.clone(), used.clone()]), expected);
        assert_eq!(modes(&[base.clone(), used.clone(), said]), expected[..1]);
        assert!(modes(&[used.clone(), base.clone()]).is_empty());
        let without = layer(&[], &[], &["a"]);
        assert!(modes(&[base, without, used]).is_empty());
    }

    #[test]
    fn they_are_made_with_all_that_leads_to_them() {
        let folder = tempfile::tempdir().unwrap();
        let base = layer(&[("x", 0o755), ("x/y", 0o1777)], &[], &[]);
        let parents = hidden(&[base, layer(&[], &["x", "x/y"], &[])]);
        make(&parents, folder.path()).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::mode;
        let of =
            |path: &str| mode(&folder.path().join(path).metadata().unwrap().permissions()) & 0o7777;
        assert_eq!((of("x"), of("x/y")), (0o755, 0o1777));
    }
}
