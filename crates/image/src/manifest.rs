//! The documents that describe an image: index, manifest and configuration, of OCI and of Docker.
//!
//! Read leniently where registries differ (unknown members, missing media types) and strictly where a guess
//! could run something else than was meant (schema 1, artifacts, another platform).

use crate::Digest;
use serde::Deserialize;

const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";

/// A document by its digest.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Descriptor {
    #[serde(default)]
    pub media_type: String,
    pub digest: Digest,
    /// Bytes.
    pub size: u64,
    pub platform: Option<Platform>,
}

/// What an image is made for, in the words of Go's `GOOS` and `GOARCH`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct Platform {
    #[serde(default)]
    pub os: String,
    #[serde(default)]
    pub architecture: String,
    #[serde(default)]
    pub variant: String,
}

impl Platform {
    /// This machine's.
    pub fn own() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        Self {
            os: "linux".to_owned(),
            architecture: architecture.to_owned(),
            variant: String::new(),
        }
    }

    /// How well this machine runs what is made for `self`; `None`: not at all. Less is better.
    fn distance(&self, own: &Self) -> Option<u32> {
        if self.os != own.os || self.architecture != own.architecture {
            return None;
        }
        match (self.architecture.as_str(), self.variant.as_str()) {
            (_, "") | ("amd64", "v1") | ("arm64", "v8") => Some(0),
            // Levels of amd64 beyond the first need instructions that the machine may lack.
            _ => None,
        }
    }
}

impl std::fmt::Display for Platform {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        if self.variant.is_empty() { Ok(()) } else { write!(f, "/{}", self.variant) }
    }
}

/// What a manifest's address led to.
#[derive(Debug)]
pub(crate) enum Document {
    Index(Vec<Descriptor>),
    Manifest(Manifest),
}

/// One platform's image.
#[derive(Debug)]
pub(crate) struct Manifest {
    pub config: Descriptor,
    /// Lowest first.
    pub layers: Vec<Descriptor>,
}

impl Document {
    /// Reads an index or a manifest; why it is neither, in words for a person.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Any {
            schema_version: u32,
            #[serde(default)]
            media_type: String,
            manifests: Option<Vec<Descriptor>>,
            config: Option<Descriptor>,
            layers: Option<Vec<Descriptor>>,
        }
        let any: Any = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        if any.schema_version != 2 {
            return Err(format!("schema version {} is not supported", any.schema_version));
        }
        let is_index = matches!(any.media_type.as_str(), OCI_INDEX | DOCKER_LIST);
        match any {
            Any { manifests: Some(manifests), config: None, layers: None, .. } => {
                Ok(Self::Index(manifests))
            }
            Any { manifests: None, config: Some(config), layers: Some(layers), .. }
                if !is_index =>
            {
                if !matches!(config.media_type.as_str(), OCI_CONFIG | DOCKER_CONFIG) {
                    return Err(format!("its configuration is of type {:?}", config.media_type));
                }
                Ok(Self::Manifest(Manifest { config, layers }))
            }
            any => Err(format!("it is neither index nor manifest (type {:?})", any.media_type)),
        }
    }
}

/// The manifest in an index for a machine; otherwise the platforms that there are.
pub(crate) fn choose<'a>(
    index: &'a [Descriptor],
    own: &Platform,
) -> Result<&'a Descriptor, Vec<String>> {
    let fitting = index.iter().filter_map(|one| {
        // Without a platform it may be anything: the configuration will tell.
        let distance =
            one.platform.as_ref().map_or(Some(u32::MAX), |platform| platform.distance(own))?;
        Some((distance, one))
    });
    fitting.min_by_key(|(distance, _)| *distance).map(|(_, one)| one).ok_or_else(|| {
        let platforms = index.iter().filter_map(|one| one.platform.as_ref());
        platforms.filter(|platform| platform.os != "unknown").map(Platform::to_string).collect()
    })
}

/// How a layer's archive is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Packing {
    Plain,
    Gzip,
    Zstd,
}

impl Packing {
    /// By media type; `None` when it is no layer this program can unpack.
    pub fn of(media_type: &str) -> Option<Self> {
        let oci = media_type.strip_prefix("application/vnd.oci.image.layer.");
        if let Some(rest) = oci {
            return match rest.strip_prefix("nondistributable.").unwrap_or(rest) {
                "v1.tar" => Some(Self::Plain),
                "v1.tar+gzip" => Some(Self::Gzip),
                "v1.tar+zstd" => Some(Self::Zstd),
                _ => None,
            };
        }
        match media_type.strip_prefix("application/vnd.docker.image.rootfs.")? {
            "diff.tar" => Some(Self::Plain),
            "diff.tar.gzip" | "foreign.diff.tar.gzip" => Some(Self::Gzip),
            "diff.tar.zstd" => Some(Self::Zstd),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(digit: &str) -> String {
        format!("sha256:{}", digit.repeat(64))
    }

    fn platform(os: &str, architecture: &str, variant: &str) -> Descriptor {
        Descriptor {
            media_type: String::new(),
            digest: digest("1").parse().unwrap(),
            size: 1,
            platform: Some(Platform {
                os: os.into(),
                architecture: architecture.into(),
                variant: variant.into(),
            }),
        }
    }

    #[test]
    fn the_platform_that_runs_here_is_chosen() {
        let own =
            Platform { os: "linux".into(), architecture: "amd64".into(), variant: String::new() };
        let index = [
            platform("unknown", "unknown", ""),
            platform("windows", "amd64", ""),
            platform("linux", "amd64", "v3"),
            platform("linux", "amd64", ""),
        ];
        assert_eq!(choose(&index, &own).unwrap(), &index[3]);
        assert_eq!(choose(&index[..3], &own).unwrap_err(), ["windows/amd64", "linux/amd64/v3"]);
        let mut nameless = platform("", "", "");
        nameless.platform = None;
        let index = [nameless, platform("linux", "amd64", "v1")];
        assert_eq!(choose(&index, &own).unwrap(), &index[1]);
        assert_eq!(choose(&index[..1], &own).unwrap(), &index[0]);
    }

    #[test]
    fn documents_that_are_no_image_say_what_they_are() {
        let config = |media_type: &str| {
            format!(r#"{{"mediaType":"{media_type}","digest":"{}","size":1}}"#, digest("2"))
        };
        let manifest =
            |config: &str| format!(r#"{{"schemaVersion":2,"config":{config},"layers":[]}}"#);
        assert!(matches!(
            Document::parse(manifest(&config(DOCKER_CONFIG)).as_bytes()),
            Ok(Document::Manifest(_))
        ));
        for (document, word) in [
            ("{".to_owned(), "EOF"),
            (r#"{"schemaVersion":1,"fsLayers":[]}"#.to_owned(), "schema version 1"),
            (r#"{"schemaVersion":2,"mediaType":"application/x"}"#.to_owned(), "application/x"),
            (manifest(&config("application/vnd.cncf.helm.config.v1+json")), "helm"),
            (manifest(r#"{"mediaType":"x","digest":"sha256:..","size":1}"#), "digest"),
        ] {
            let why = Document::parse(document.as_bytes()).unwrap_err();
            assert!(why.contains(word), "{document}: {why}");
        }
    }

    #[test]
    fn layers_are_told_by_their_type() {
        for (media_type, packing) in [
            ("application/vnd.oci.image.layer.v1.tar", Some(Packing::Plain)),
            ("application/vnd.oci.image.layer.v1.tar+zstd", Some(Packing::Zstd)),
            ("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", Some(Packing::Gzip)),
            ("application/vnd.docker.image.rootfs.diff.tar.gzip", Some(Packing::Gzip)),
            ("application/vnd.oci.image.layer.v1.tar+gzip+encrypted", None),
            ("application/wasm", None),
        ] {
            assert_eq!(Packing::of(media_type), packing, "{media_type}");
        }
    }
}
