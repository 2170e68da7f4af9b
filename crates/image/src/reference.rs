//! Names of images, normalised as Docker and containerd do it.
//!
//! `busybox` is `docker.io/library/busybox:latest`. A name with both tag and digest means the digest: the
//! tag is checked and dropped.

use crate::{Digest, ImageError};
use std::{fmt, str::FromStr};

const DEFAULT_HOST: &str = "docker.io";
const OFFICIAL: &str = "library/";
const LONGEST_REPOSITORY: usize = 255;
const LONGEST_TAG: usize = 128;

/// A whole image name: registry, repository, and a tag or a digest.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reference {
    host: String,
    repository: String,
    version: Version,
}

/// What of the repository is meant.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Version {
    Tag(String),
    Digest(Digest),
}

impl Reference {
    /// Reads a name as people and kubelet write it.
    pub fn parse(text: &str) -> Result<Self, ImageError> {
        parse(text).map_err(|why| ImageError::Reference {
            reference: text.chars().take(512).collect(),
            why,
        })
    }

    /// The registry's name with its port if it has one; `docker.io` for Docker's.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The repository inside the registry, as in `library/busybox`.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// Registry and repository, as in `docker.io/library/busybox`.
    pub fn name(&self) -> String {
        format!("{}/{}", self.host, self.repository)
    }

    /// The tag; `None` when the name has a digest.
    pub fn tag(&self) -> Option<&str> {
        match &self.version {
            Version::Tag(tag) => Some(tag),
            Version::Digest(_) => None,
        }
    }

    /// The digest; `None` when the name has only a tag.
    pub fn digest(&self) -> Option<&Digest> {
        match &self.version {
            Version::Tag(_) => None,
            Version::Digest(digest) => Some(digest),
        }
    }

    /// The same repository, by digest.
    pub fn with_digest(&self, digest: Digest) -> Self {
        Self { version: Version::Digest(digest), ..self.clone() }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.repository)?;
        match &self.version {
            Version::Tag(tag) => write!(f, ":{tag}"),
            Version::Digest(digest) => write!(f, "@{digest}"),
        }
    }
}

impl FromStr for Reference {
    type Err = ImageError;

    fn from_str(text: &str) -> Result<Self, ImageError> {
        Self::parse(text)
    }
}

fn parse(text: &str) -> Result<Reference, &'static str> {
    if text.is_empty() {
        return Err("it is empty");
    }
    if text.len() == 64 && text.bytes().all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f')) {
        return Err("64 hexadecimal digits are an image id, not a name");
    }
    let (name, digest) = match text.split_once('@') {
        Some((name, digest)) => {
            let digest = digest.parse().map_err(|_| "its digest is no sha256 or sha512 digest")?;
            (name, Some(digest))
        }
        None => (text, None),
    };
    // A colon after the last slash starts a tag; one before it belongs to the registry's port.
    let last = name.rfind('/').map_or(0, |slash| slash + 1);
    let (name, tag) = match name[last..].find(':') {
        Some(colon) => (&name[..last + colon], Some(&name[last + colon + 1..])),
        None => (name, None),
    };
    let (host, path) = split_host(name);
    if let Some(tag) = tag {
        check_tag(tag)?;
    }
    check_host(host)?;
    let repository = if host == DEFAULT_HOST && !path.contains('/') {
        format!("{OFFICIAL}{path}")
    } else {
        path.to_owned()
    };
    check_repository(&repository)?;
    if host.len() + 1 + repository.len() > LONGEST_REPOSITORY {
        return Err("its name is longer than 255 characters");
    }
    Ok(Reference {
        host: host.to_owned(),
        repository,
        version: match digest {
            Some(digest) => Version::Digest(digest),
            None => Version::Tag(tag.unwrap_or("latest").to_owned()),
        },
    })
}

/// The first part is a registry when it could not be part of a repository on Docker's.
fn split_host(name: &str) -> (&str, &str) {
    match name.split_once('/') {
        Some((first, rest))
            if first == "localhost"
                || first.contains(['.', ':'])
                || first.bytes().any(|c| c.is_ascii_uppercase()) =>
        {
            let host = if matches!(first, "index.docker.io" | "registry-1.docker.io") {
                DEFAULT_HOST
            } else {
                first
            };
            (host, rest)
        }
        _ => (DEFAULT_HOST, name),
    }
}

fn check_host(host: &str) -> Result<(), &'static str> {
    const WHY: &str = "its registry is no host name or address with an optional port";
    let (name, port) = match host.strip_prefix('[') {
        Some(rest) => {
            let (address, port) = rest.split_once(']').ok_or(WHY)?;
            address.parse::<std::net::Ipv6Addr>().map_err(|_| WHY)?;
            (None, if port.is_empty() { None } else { Some(port.strip_prefix(':').ok_or(WHY)?) })
        }
        None => match host.split_once(':') {
            Some((name, port)) => (Some(name), Some(port)),
            None => (Some(host), None),
        },
    };
    if let Some(port) = port
        && (port.is_empty() || port.parse::<u16>().is_err() || port.starts_with('+'))
    {
        return Err(WHY);
    }
    let label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'-')
    };
    let plain = name.is_none_or(|name| name.split('.').all(label));
    // What the client could not make an address of (`999.1.1.1`) is refused here, not in the middle of a pull.
    if plain && url::Url::parse(&format!("https://{host}/")).is_ok() { Ok(()) } else { Err(WHY) }
}

fn check_repository(path: &str) -> Result<(), &'static str> {
    if path.bytes().any(|c| c.is_ascii_uppercase()) {
        return Err("its repository has capital letters");
    }
    if path.split('/').all(is_component) {
        Ok(())
    } else {
        Err("its repository is not made of lower case words, digits and single separators")
    }
}

/// Words of `[a-z0-9]` joined by `.`, `_`, `__` or any number of `-`.
fn is_component(text: &str) -> bool {
    let word = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
    let bytes = text.as_bytes();
    if !bytes.first().copied().is_some_and(word) || !bytes.last().copied().is_some_and(word) {
        return false;
    }
    bytes.split(|&c| word(c)).filter(|separator| !separator.is_empty()).all(|separator| {
        matches!(separator, b"." | b"_" | b"__") || separator.iter().all(|&c| c == b'-')
    })
}

fn check_tag(tag: &str) -> Result<(), &'static str> {
    let first = |c: u8| c.is_ascii_alphanumeric() || c == b'_';
    let good = tag.len() <= LONGEST_TAG
        && tag.bytes().next().is_some_and(first)
        && tag.bytes().all(|c| first(c) || matches!(c, b'.' | b'-'));
    if good { Ok(()) } else { Err("its tag is not 1 to 128 of letters, digits, _ . -") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HEX: &str = "sha256:9700f9a2f5bf2c45f2f605a0bd3bce7cf37420ec9d3ed50ac2758413308766bf";

    #[test]
    fn names_are_completed_as_docker_completes_them() {
        for (written, whole) in [
            ("busybox", "docker.io/library/busybox:latest"),
            ("busybox:1.29", "docker.io/library/busybox:1.29"),
            ("a/b", "docker.io/a/b:latest"),
            ("docker.io/busybox", "docker.io/library/busybox:latest"),
            ("index.docker.io/a/b:c", "docker.io/a/b:c"),
            ("localhost/a", "localhost/a:latest"),
            ("localhost:5000/a", "localhost:5000/a:latest"),
            ("127.0.0.1:5000/a/b_c:d", "127.0.0.1:5000/a/b_c:d"),
            ("[::1]:5000/a", "[::1]:5000/a:latest"),
            ("registry.k8s.io/pause:3.9", "registry.k8s.io/pause:3.9"),
            (
                "gcr.io/k8s-staging-cri-tools/test-image-tag:test",
                "gcr.io/k8s-staging-cri-tools/test-image-tag:test",
            ),
            ("a--b/c__d", "docker.io/a--b/c__d:latest"),
            ("Host/a", "Host/a:latest"),
        ] {
            assert_eq!(Reference::parse(written).unwrap().to_string(), whole, "{written}");
        }
    }

    #[test]
    fn a_digest_wins_over_a_tag() {
        let whole = format!("docker.io/library/busybox@{HEX}");
        for written in [format!("busybox@{HEX}"), format!("busybox:1.29@{HEX}")] {
            let reference = Reference::parse(&written).unwrap();
            assert_eq!(reference.to_string(), whole);
            assert_eq!(reference.tag(), None);
        }
    }

    #[test]
    fn what_is_no_name_is_refused_with_a_reason() {
        for bad in [
            "",
            "BUSYBOX",
            "busybox:",
            "busybox:a b",
            "busybox@sha256:abc",
            "a//b",
            "/a",
            "a/",
            "a..b/c",
            "a___b",
            "-a",
            "x.y:99999/a",
            "x.y:/a",
            "x..y/a",
            "http://x.y/a",
            "[::1/a",
            "busybox@",
            &"a".repeat(250),
            &HEX[7..],
            &format!("a:{}", "t".repeat(129)),
            "../../etc/passwd",
            "a/../b",
            "ü",
        ] {
            assert!(matches!(Reference::parse(bad), Err(ImageError::Reference { .. })), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_refused_or_has_one_whole_form(text in "[a-zA-Z0-9./:@_\\[\\]-]{0,40}|\\PC{0,40}") {
            if let Ok(reference) = Reference::parse(&text) {
                let whole = reference.to_string();
                prop_assert_eq!(&Reference::parse(&whole).unwrap(), &reference, "{}", whole);
                let safe = |part: &str| !part.is_empty() && part != "." && part != "..";
                prop_assert!(reference.repository().split('/').all(safe));
                let url = format!("https://{}/v2/{}/manifests/x", reference.host(), reference.repository());
                let url = url::Url::parse(&url).unwrap();
                let path = format!("/v2/{}/manifests/x", reference.repository());
                prop_assert_eq!(url.path(), path);
            }
        }
    }
}
