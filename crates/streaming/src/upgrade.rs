//! From an HTTP request to a SPDY or WebSocket connection: what clients ask for and what they are answered.

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, header};
use http_body_util::Full;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

/// What the protocols of remotecommand and port-forward are named in.
pub(crate) const PROTOCOL: HeaderName = HeaderName::from_static("x-stream-protocol-version");
const ACCEPTED: HeaderName = HeaderName::from_static("x-accepted-stream-protocol-versions");
const SPDY: &str = "SPDY/3.1";

/// An answer to a request.
pub(crate) type Answer = Response<Full<Bytes>>;

/// How a client wants to go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wish {
    Spdy,
    WebSocket,
}

/// What the client wants to become of the connection; `None`: it is no upgrade.
pub(crate) fn wish(headers: &HeaderMap) -> Option<Wish> {
    if !words(headers, &header::CONNECTION).any(|word| word.eq_ignore_ascii_case("upgrade")) {
        return None;
    }
    words(headers, &header::UPGRADE).find_map(|word| match word {
        word if word.eq_ignore_ascii_case(SPDY) => Some(Wish::Spdy),
        word if word.eq_ignore_ascii_case("websocket") => Some(Wish::WebSocket),
        _ => None,
    })
}

/// The first of the client's protocols that is ours too; `None`: it names none.
pub(crate) fn choose(
    headers: &HeaderMap,
    name: &HeaderName,
    ours: &[&'static str],
) -> Result<Option<&'static str>, Box<Answer>> {
    let theirs: Vec<_> = words(headers, name).collect();
    if theirs.is_empty() {
        return Ok(None);
    }
    let common = theirs.iter().find_map(|one| ours.iter().find(|our| *our == one));
    if let Some(common) = common {
        return Ok(Some(common));
    }
    let (theirs, ours_too) = (theirs.join(" "), ours.join(" "));
    let text = format!(
        "unable to upgrade: unable to negotiate protocol: client supports [{theirs}], server accepts [{ours_too}]"
    );
    let mut refusal = answer(StatusCode::FORBIDDEN, &text);
    for one in ours {
        refusal.headers_mut().append(ACCEPTED, HeaderValue::from_static(one));
    }
    Err(Box::new(refusal))
}

/// Yes to SPDY, in this protocol.
pub(crate) fn to_spdy(protocol: &'static str) -> Answer {
    let mut yes = switching(SPDY);
    yes.headers_mut().insert(PROTOCOL, HeaderValue::from_static(protocol));
    yes
}

/// Yes to WebSocket (RFC 6455), with the protocol when the client named any.
pub(crate) fn to_websocket(
    headers: &HeaderMap,
    protocol: Option<&'static str>,
) -> Result<Answer, Box<Answer>> {
    let key = headers
        .get(header::SEC_WEBSOCKET_KEY)
        .filter(|key| STANDARD.decode(key.as_bytes()).is_ok_and(|bytes| bytes.len() == 16));
    let version = headers.get(header::SEC_WEBSOCKET_VERSION).map(HeaderValue::as_bytes);
    let (Some(key), Some(b"13")) = (key, version) else {
        let mut no = answer(StatusCode::BAD_REQUEST, "a WebSocket needs its key and version 13");
        no.headers_mut().insert(header::SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
        return Err(Box::new(no));
    };
    let mut yes = switching("websocket");
    if let Ok(value) = HeaderValue::from_str(&derive_accept_key(key.as_bytes())) {
        yes.headers_mut().insert(header::SEC_WEBSOCKET_ACCEPT, value);
    }
    if let Some(protocol) = protocol {
        let value = HeaderValue::from_static(protocol);
        yes.headers_mut().insert(header::SEC_WEBSOCKET_PROTOCOL, value);
    }
    Ok(yes)
}

/// An answer with one line of text.
pub(crate) fn answer(status: StatusCode, text: &str) -> Answer {
    let mut answer = Response::new(Full::from(format!("{text}\n")));
    *answer.status_mut() = status;
    answer
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    answer
}

fn switching(to: &'static str) -> Answer {
    let mut yes = Response::new(Full::default());
    *yes.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    yes.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    yes.headers_mut().insert(header::UPGRADE, HeaderValue::from_static(to));
    yes
}

fn words<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    let values = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).map(str::trim).filter(|word| !word.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(HeaderName, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(name, HeaderValue::from_static(value));
        }
        headers
    }

    #[test]
    fn only_an_upgrade_is_one() {
        let upgrade = |connection, to| {
            wish(&headers(&[(header::CONNECTION, connection), (header::UPGRADE, to)]))
        };
        assert_eq!(upgrade("keep-alive, Upgrade", "SPDY/3.1"), Some(Wish::Spdy));
        assert_eq!(upgrade("upgrade", "WebSocket"), Some(Wish::WebSocket));
        assert_eq!(upgrade("close", "SPDY/3.1"), None);
        assert_eq!(upgrade("upgrade", "h2c"), None);
    }

    #[test]
    fn the_clients_first_choice_counts_and_none_in_common_is_refused_with_a_list() {
        let ours = ["v4.channel.k8s.io", "channel.k8s.io"];
        let with = |value| choose(&headers(&[(PROTOCOL, value)]), &PROTOCOL, &ours);
        assert_eq!(with("v5.channel.k8s.io, channel.k8s.io").unwrap(), Some("channel.k8s.io"));
        assert_eq!(with("v4.channel.k8s.io,channel.k8s.io").unwrap(), Some("v4.channel.k8s.io"));
        assert_eq!(with(" ,").unwrap(), None);
        assert_eq!(choose(&HeaderMap::new(), &PROTOCOL, &ours).unwrap(), None);
        let refusal = with("v9.channel.k8s.io").unwrap_err();
        assert_eq!(refusal.status(), StatusCode::FORBIDDEN);
        assert_eq!(refusal.headers().get_all(ACCEPTED).iter().count(), 2);
    }

    #[test]
    fn a_websocket_is_answered_by_its_key() {
        let asked = headers(&[
            (header::SEC_WEBSOCKET_KEY, "dGhlIHNhbXBsZSBub25jZQ=="),
            (header::SEC_WEBSOCKET_VERSION, "13"),
        ]);
        let yes = to_websocket(&asked, Some("v5.channel.k8s.io")).unwrap();
        assert_eq!(yes.headers()[header::SEC_WEBSOCKET_ACCEPT], "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
        let no = to_websocket(&HeaderMap::new(), None).unwrap_err();
        assert_eq!(no.status(), StatusCode::BAD_REQUEST);
    }
}
