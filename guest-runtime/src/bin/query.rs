//! The guest program of `instar map, compare and measure`.
#![no_std]
#![no_main]

use instar_guest::ops::serve_query;

instar_guest::program!(serve_query);
