//! Paths inside a layer: bytes as an archive has them, made harmless by parts.

/// The parts of a path below the layer's root, `.` and empty ones left out and `..` taken back as written.
/// `None` when it leads out of the root or holds a zero byte.
pub(crate) fn components(path: &[u8]) -> Option<Vec<&[u8]>> {
    if path.contains(&0) {
        return None;
    }
    let mut parts = Vec::new();
    for part in path.split(|&c| c == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                parts.pop()?;
            }
            part => parts.push(part),
        }
    }
    Some(parts)
}

/// A path below another; the root is empty.
pub(crate) fn join(folder: &[u8], name: &[u8]) -> Vec<u8> {
    if folder.is_empty() { name.to_vec() } else { [folder, name].join(&b'/') }
}

/// Whether `path` is below `folder` (and not `folder` itself).
pub(crate) fn is_below(path: &[u8], folder: &[u8]) -> bool {
    folder.is_empty() && !path.is_empty()
        || path.strip_prefix(folder).is_some_and(|rest| rest.first() == Some(&b'/'))
}

/// The folders that hold `path`, from the top, without the root.
pub(crate) fn ancestors(path: &str) -> impl Iterator<Item = &str> {
    path.match_indices('/').map(|(index, _)| &path[..index])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn paths_stay_below_the_root() {
        let parts = |path: &str| {
            components(path.as_bytes())
                .map(|parts| parts.join(&b'/'))
                .map(|path| String::from_utf8(path).unwrap())
        };
        assert_eq!(parts("/a//./b/").as_deref(), Some("a/b"));
        assert_eq!(parts("a/../b").as_deref(), Some("b"));
        assert_eq!(parts("./").as_deref(), Some(""));
        assert_eq!(parts("..").as_deref(), None);
        assert_eq!(parts("a/../../b").as_deref(), None);
        assert_eq!(parts("/..").as_deref(), None);
        assert_eq!(parts("a\0b").as_deref(), None);
        assert!(
            is_below(b"a/b", b"a")
                && is_below(b"a", b"")
                && !is_below(b"ab", b"a")
                && !is_below(b"a", b"a")
        );
        assert_eq!(ancestors("a/b/c").collect::<Vec<_>>(), ["a", "a/b"]);
    }

    proptest! {
        #[test]
        fn no_path_has_parts_that_climb(path in proptest::collection::vec(prop_oneof![Just(b'.'), Just(b'/'), any::<u8>()], 0..40)) {
            for part in components(&path).unwrap_or_default() {
                prop_assert!(!part.is_empty() && part != b"." && part != b".." && !part.contains(&b'/') && !part.contains(&0));
            }
        }
    }
}
