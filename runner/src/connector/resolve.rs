//! Names to addresses without the C library: literals and /etc/hosts first, then a question to the configured name
//! servers over UDP, with search domains and `ndots`.
//!
//! The runner is one static file, and the C library's resolver loads shared objects. Answers are used for dialling only;
//! who is at the other end is decided by its certificate, so a forged answer can deny service and nothing else.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use tokio::net::UdpSocket;

/// What the files of the host say.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Settings {
    servers: Vec<SocketAddr>,
    search: Vec<String>,
    dots: usize,
}

/// Addresses of `host`, best first.
///
/// # Errors
/// When no source knows the name; the text names it.
pub async fn resolve(host: &str) -> io::Result<Vec<IpAddr>> {
    let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
    if let Ok(address) = bare.parse() {
        return Ok(vec![address]);
    }
    let hosts = tokio::fs::read_to_string("/etc/hosts").await.unwrap_or_default();
    let known = from_hosts(&hosts, bare);
    if !known.is_empty() {
        return Ok(known);
    }
    if bare.eq_ignore_ascii_case("localhost") {
        return Ok(vec![IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)]);
    }
    let settings = parse_settings(&tokio::fs::read_to_string("/etc/resolv.conf").await.unwrap_or_default());
    for name in candidates(bare, &settings) {
        let addresses = ask_all(&settings, &name).await;
        if !addresses.is_empty() {
            return Ok(addresses);
        }
    }
    Err(io::Error::new(io::ErrorKind::NotFound, format!("no address is known for {bare}")))
}

fn from_hosts(hosts: &str, name: &str) -> Vec<IpAddr> {
    let lines = hosts.lines().map(|line| line.split('#').next().unwrap_or_default());
    lines
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let address = words.next()?.parse().ok()?;
            words.any(|word| word.eq_ignore_ascii_case(name)).then_some(address)
        })
        .collect()
}

fn parse_settings(text: &str) -> Settings {
    let mut settings = Settings { servers: Vec::new(), search: Vec::new(), dots: 1 };
    for line in text.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("nameserver") => {
                let address = words.next().and_then(|word| word.parse::<IpAddr>().ok());
                settings.servers.extend(address.map(|address| SocketAddr::new(address, 53)));
            }
            Some("search" | "domain") => settings.search = words.map(str::to_owned).collect(),
            Some("options") => {
                if let Some(dots) = words.find_map(|word| word.strip_prefix("ndots:")) {
                    settings.dots = dots.parse().unwrap_or(1);
                }
            }
            _ => {}
        }
    }
    settings.servers.truncate(3);
    settings.search.truncate(6);
    settings
}

fn candidates(name: &str, settings: &Settings) -> Vec<String> {
    if let Some(full) = name.strip_suffix('.') {
        return vec![full.to_owned()];
    }
    let mut names: Vec<_> = settings.search.iter().map(|domain| format!("{name}.{domain}")).collect();
    let position = if name.matches('.').count() >= settings.dots { 0 } else { names.len() };
    names.insert(position, name.to_owned());
    names
}

async fn ask_all(settings: &Settings, name: &str) -> Vec<IpAddr> {
    for server in &settings.servers {
        let (four, six) = tokio::join!(ask(*server, name, 1), ask(*server, name, 28));
        match (four, six) {
            (Err(_), Err(_)) => {}
            (four, six) => return [four.unwrap_or_default(), six.unwrap_or_default()].concat(),
        }
    }
    Vec::new()
}

async fn ask(server: SocketAddr, name: &str, kind: u16) -> io::Result<Vec<IpAddr>> {
    let id = u16::from_le_bytes([uuid::Uuid::new_v4().as_bytes()[0], uuid::Uuid::new_v4().as_bytes()[1]]);
    let question = question(id, name, kind)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, format!("{name} is not a host name")))?;
    let local: SocketAddr =
        if server.is_ipv4() { (Ipv4Addr::UNSPECIFIED, 0).into() } else { (Ipv6Addr::UNSPECIFIED, 0).into() };
    let socket = UdpSocket::bind(local).await?;
    socket.connect(server).await?;
    let mut buffer = [0_u8; 1232];
    for _ in 0..2 {
        socket.send(&question).await?;
        match tokio::time::timeout(Duration::from_secs(2), socket.recv(&mut buffer)).await {
            Ok(received) => {
                let length = received?;
                if let Some(addresses) = parse_answer(&buffer[..length], id, kind) {
                    return Ok(addresses);
                }
            }
            Err(_) => continue,
        }
    }
    Err(io::Error::new(io::ErrorKind::TimedOut, format!("name server {server} gave no answer for {name}")))
}

fn question(id: u16, name: &str, kind: u16) -> Option<Vec<u8>> {
    let mut packet = Vec::with_capacity(64);
    packet.extend(id.to_be_bytes());
    packet.extend([0x01, 0x00, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in name.split('.') {
        let length = u8::try_from(label.len()).ok().filter(|length| (1..=63).contains(length))?;
        packet.push(length);
        packet.extend(label.as_bytes());
    }
    packet.push(0);
    packet.extend(kind.to_be_bytes());
    packet.extend([0, 1]);
    (packet.len() <= 271).then_some(packet)
}

/// Addresses of an answer; `None` when the packet is not an answer to our question.
fn parse_answer(packet: &[u8], id: u16, kind: u16) -> Option<Vec<IpAddr>> {
    let word = |at: usize| Some(u16::from_be_bytes([*packet.get(at)?, *packet.get(at + 1)?]));
    if word(0)? != id || packet.get(2)? & 0x80 == 0 {
        return None;
    }
    let (questions, answers) = (word(4)?, word(6)?);
    let mut at = 12;
    for _ in 0..questions {
        at = skip_name(packet, at)? + 4;
    }
    let mut addresses = Vec::new();
    for _ in 0..answers {
        at = skip_name(packet, at)?;
        let (found, length) = (word(at)?, usize::from(word(at + 8)?));
        let data = packet.get(at + 10..at + 10 + length)?;
        if found == kind {
            if let Ok(octets) = <[u8; 4]>::try_from(data) {
                addresses.push(IpAddr::from(octets));
            } else if let Ok(octets) = <[u8; 16]>::try_from(data) {
                addresses.push(IpAddr::from(octets));
            }
        }
        at += 10 + length;
    }
    Some(addresses)
}

fn skip_name(packet: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match *packet.get(at)? {
            0 => return Some(at + 1),
            length if length & 0xc0 == 0xc0 => return Some(at + 2),
            length => at += 1 + usize::from(length),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn hosts_file_is_read_by_name_and_alias_and_comments_are_ignored() {
        let hosts = "127.0.0.1 localhost\n10.0.0.7 Orch.Example orch # 10.0.0.8 other\n::1 orch\nrubbish orch\n";
        assert_eq!(from_hosts(hosts, "orch"), ["10.0.0.7".parse::<IpAddr>().unwrap(), "::1".parse().unwrap()]);
        assert!(from_hosts(hosts, "other").is_empty());
    }

    #[test]
    fn search_domains_come_first_for_short_names_and_last_for_long_ones() {
        let settings = parse_settings("nameserver 10.0.0.1\nsearch a.b c\noptions timeout:1 ndots:2\n");
        assert_eq!(candidates("x", &settings), ["x.a.b", "x.c", "x"]);
        assert_eq!(candidates("x.y.z", &settings), ["x.y.z", "x.y.z.a.b", "x.y.z.c"]);
        assert_eq!(candidates("x.", &settings), ["x"]);
    }

    #[test]
    fn answer_with_alias_and_address_is_understood() {
        let mut packet = question(7, "a.b", 1).unwrap();
        packet[2] = 0x81;
        packet[7] = 2;
        packet.extend([0xc0, 12, 0, 5, 0, 1, 0, 0, 0, 9, 0, 2, 0xc0, 12]);
        packet.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 9, 0, 4, 192, 0, 2, 1]);
        assert_eq!(parse_answer(&packet, 7, 1), Some(vec!["192.0.2.1".parse().unwrap()]));
        assert_eq!(parse_answer(&packet, 8, 1), None);
    }

    proptest! {
        #[test]
        fn no_packet_makes_the_parser_panic(packet in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse_answer(&packet, 0, 1);
        }
    }
}
