//! Who asks: credentials, a registry's challenge, and tokens.

use crate::{ImageError, hosts::Host};
use base64::{Engine, engine::general_purpose::STANDARD};
use http::HeaderValue;
use std::fmt;

/// Credentials for a registry, as kubelet gives them with a pull. Empty fields mean not given.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Auth {
    /// With `password`.
    pub username: String,
    /// With `username`.
    pub password: String,
    /// Exchanged for an access token (OAuth 2 refresh token).
    pub identity_token: String,
    /// Sent as it is (bearer token).
    pub registry_token: String,
    /// `username:password` in base64.
    pub auth: String,
    /// The only registry these are for; empty: for all that the image's configuration names.
    pub server_address: String,
}

impl fmt::Debug for Auth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Auth").field("server_address", &self.server_address).finish_non_exhaustive()
    }
}

/// Credentials in the one form they are used.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Credentials {
    Anonymous,
    Password { username: String, password: String },
    Refresh(String),
    Bearer(String),
}

impl Auth {
    /// What these are, or why they are nothing.
    pub(crate) fn credentials(&self, image: &str) -> Result<Credentials, ImageError> {
        if !self.registry_token.is_empty() {
            return Ok(Credentials::Bearer(self.registry_token.clone()));
        }
        if !self.username.is_empty() {
            return Ok(Credentials::Password {
                username: self.username.clone(),
                password: self.password.clone(),
            });
        }
        if !self.identity_token.is_empty() {
            return Ok(Credentials::Refresh(self.identity_token.clone()));
        }
        if self.auth.is_empty() {
            return Ok(Credentials::Anonymous);
        }
        let pair =
            STANDARD.decode(self.auth.trim()).ok().and_then(|bytes| String::from_utf8(bytes).ok());
        match pair.as_deref().and_then(|pair| pair.split_once(':')) {
            Some((username, password)) => Ok(Credentials::Password {
                username: username.to_owned(),
                password: password.trim_end_matches('\0').to_owned(),
            }),
            None => Err(ImageError::Credentials {
                image: image.to_owned(),
                why: "auth is not username:password in base64",
            }),
        }
    }

    /// Whether `host`, asked for an image of `registry`, may see these. Mirrors are the node owner's own
    /// choice, so they do, unless the credentials name another registry.
    pub(crate) fn is_for(&self, host: &Host, registry: &str) -> bool {
        if self.server_address.is_empty() {
            return true;
        }
        let address =
            self.server_address.split_once("://").map_or(&*self.server_address, |(_, rest)| rest);
        let address = address.split('/').next().unwrap_or_default();
        let asked = match host.base.port() {
            Some(port) => format!("{}:{port}", host.base.host_str().unwrap_or_default()),
            None => host.base.host_str().unwrap_or_default().to_owned(),
        };
        docker(address) == docker(&asked) || (!host.proxy && docker(address) == docker(registry))
    }
}

/// Docker's registry under the name it has in references.
fn docker(address: &str) -> &str {
    match address {
        "index.docker.io" | "registry-1.docker.io" => "docker.io",
        other => other,
    }
}

/// `Authorization` for a user name and a password.
pub(crate) fn basic(username: &str, password: &str) -> Option<HeaderValue> {
    secret(&format!("Basic {}", STANDARD.encode(format!("{username}:{password}"))))
}

/// `Authorization` for a token.
pub(crate) fn bearer(token: &str) -> Option<HeaderValue> {
    secret(&format!("Bearer {token}"))
}

fn secret(text: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::try_from(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}

/// One way a registry offers to authenticate (`WWW-Authenticate`).
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Challenge {
    /// In lower case.
    pub scheme: String,
    /// Names in lower case.
    pub parameters: Vec<(String, String)>,
}

impl Challenge {
    pub fn get(&self, name: &str) -> Option<&str> {
        self.parameters.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

/// All challenges of one header's text. What cannot be understood is left out.
pub(crate) fn challenges(text: &str) -> Vec<Challenge> {
    let mut found: Vec<Challenge> = Vec::new();
    let mut rest = text;
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        let end = rest.find([' ', '\t', ',', '=']).unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        if word.is_empty() {
            // The end, or a stray `=`, after which nothing can be trusted.
            return found;
        }
        let value = after.trim_start_matches([' ', '\t']).strip_prefix('=');
        let (Some(value), Some(challenge)) = (value, found.last_mut()) else {
            found.push(Challenge { scheme: word.to_ascii_lowercase(), parameters: Vec::new() });
            rest = after;
            continue;
        };
        let (value, after) = parameter(value.trim_start_matches([' ', '\t']));
        challenge.parameters.push((word.to_ascii_lowercase(), value));
        rest = after;
    }
}

/// A token or a quoted string, and what follows it.
fn parameter(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find([' ', '\t', ',']).unwrap_or(text.len());
        return (text[..end].to_owned(), &text[end..]);
    };
    let mut value = String::new();
    let mut characters = quoted.char_indices();
    while let Some((index, c)) = characters.next() {
        match c {
            '"' => return (value, &quoted[index + 1..]),
            '\\' => value.extend(characters.next().map(|(_, c)| c)),
            c => value.push(c),
        }
    }
    (value, "")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn challenges_are_read_with_their_parameters() {
        let text = r#"Basic realm="a, \"b\"", bearer Realm="https://auth.example/token?x=1,2",service=reg.example,scope="repository:a/b:pull""#;
        let found = challenges(text);
        assert_eq!(found.len(), 2);
        assert_eq!(found[0].get("realm"), Some("a, \"b\""));
        assert_eq!(found[1].scheme, "bearer");
        assert_eq!(found[1].get("realm"), Some("https://auth.example/token?x=1,2"));
        assert_eq!(found[1].get("service"), Some("reg.example"));
        assert_eq!(found[1].get("scope"), Some("repository:a/b:pull"));
        assert_eq!(challenges("Negotiate, Basic")[1].scheme, "basic");
        assert!(challenges("").is_empty());
    }

    proptest! {
        #[test]
        fn any_header_is_read_to_its_end(text in "\\PC{0,60}|([a-z]{1,3}[ ,=\"\\\\]){0,20}") {
            challenges(&text);
        }
    }

    #[test]
    fn every_form_of_credentials_is_understood() {
        let auth = |set: fn(&mut Auth)| {
            let mut auth = Auth::default();
            set(&mut auth);
            auth.credentials("x")
        };
        let password = Credentials::Password { username: "u".into(), password: "p:q".into() };
        assert!(auth(|_| {}).unwrap() == Credentials::Anonymous);
        assert!(
            auth(|a| (a.username, a.password) = ("u".into(), "p:q".into())).unwrap() == password
        );
        assert!(auth(|a| a.auth = STANDARD.encode("u:p:q\0\0")).unwrap() == password);
        assert!(
            auth(|a| a.identity_token = "t".into()).unwrap() == Credentials::Refresh("t".into())
        );
        assert!(
            auth(|a| a.registry_token = "t".into()).unwrap() == Credentials::Bearer("t".into())
        );
        assert!(auth(|a| a.auth = "%".into()).is_err());
        assert!(auth(|a| a.auth = STANDARD.encode("no colon")).is_err());
    }

    #[test]
    fn credentials_go_to_the_registry_they_name_and_to_no_other() {
        let own = crate::hosts::hosts(None, "docker.io").unwrap().remove(0);
        let mirror = Host {
            base: url::Url::parse("http://127.0.0.1:5000/v2").unwrap(),
            proxy: true,
            ..own.clone()
        };
        let auth = |server: &str| Auth { server_address: server.into(), ..Auth::default() };
        assert!(auth("").is_for(&own, "docker.io") && auth("").is_for(&mirror, "docker.io"));
        let docker = auth("https://index.docker.io/v1/");
        assert!(docker.is_for(&own, "docker.io") && !docker.is_for(&mirror, "docker.io"));
        let local = auth("127.0.0.1:5000");
        assert!(!local.is_for(&own, "docker.io") && local.is_for(&mirror, "docker.io"));
    }

    #[test]
    fn secrets_are_not_printed() {
        let auth = Auth { password: "hunter2".into(), ..Auth::default() };
        assert!(!format!("{auth:?}").contains("hunter2"));
        assert!(!format!("{:?}", bearer("hunter2")).contains("hunter2"));
    }
}
